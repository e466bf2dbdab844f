"""Under libraries that wrap models and optimizers, parameters end up the same as with torch's class.

Distributed cases run in two processes over gloo. A library that is not installed is skipped.
"""

import pytest

torch = pytest.importorskip("torch")

from processes import start  # noqa: E402
from torch_twins import assert_same_numbers  # noqa: E402

from rmsprop_gpu.torch import RMSprop  # noqa: E402

BEGIN = """
import os, sys
import torch
import torch.distributed as dist
from rmsprop_gpu.torch import RMSprop

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=os.environ["STORE"], rank=rank, world_size=2)
CLASSES = (torch.optim.RMSprop, RMSprop)
GIVEN = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 4)).double()

def train(model, opt, steps=3, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(100 + 2 * step + rank)
        opt.zero_grad(set_to_none=step % 2 == 0)
        model(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
        opt.step()

def compare(ends):
    for got, want in zip(ends[1], ends[0], strict=True):
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-10, atol=1e-12)
"""
# gloo's threads may crash an interpreter that exits before they do. What happens then is ignored.
END = """
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def together(code, tmp_path):
    """What two processes print that run this code as a group."""
    store = f"file://{tmp_path / 'store'}"
    code = BEGIN + code + END
    both = [start(code, STORE=store, RANK=str(rank), OMP_NUM_THREADS="1", SHARED=str(tmp_path)) for rank in range(2)]
    said = []
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        said.append(out.strip().splitlines()[-1])
    return said


def test_ddp_with_gradients_that_are_views_of_buckets(tmp_path):
    code = """
from torch.nn.parallel import DistributedDataParallel

ends = []
for cls in CLASSES:
    model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
    opt = cls(model.parameters(), **GIVEN)
    train(model, opt)
    ends.append(list(model.parameters()))
compare(ends)
print(opt.why_not_fused())
"""
    assert together(code, tmp_path) == ["{}"] * 2


@pytest.mark.parametrize("bucket_view", [False, True])
def test_zero_redundancy_optimizer(bucket_view, tmp_path):
    code = f"""
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

ends, saved = [], []
for cls in CLASSES:
    model = DistributedDataParallel(network())
    opt = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=cls, parameters_as_bucket_view={bucket_view}, **GIVEN
    )
    train(model, opt)
    opt.consolidate_state_dict(to=0)
    if rank == 0:
        saved.append(opt.state_dict())
        opt.load_state_dict(saved[-1])
    train(model, opt, first=3)
    ends.append(list(model.parameters()))
compare(ends)
if rank == 0:
    assert saved[0]["state"].keys() == saved[1]["state"].keys()
print(type(opt.optim).__module__.split(".")[0], opt.optim.why_not_fused())
"""
    assert together(code, tmp_path) == ["rmsprop_gpu {}"] * 2


def test_fsdp2(tmp_path):
    """Its parameters are DTensors, so torch's step updates them."""
    code = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

ends = []
for cls in CLASSES:
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    opt = cls(list(model.named_parameters()), **GIVEN)
    train(model, opt)
    ends.append([p.full_tensor() for p in model.parameters()])
compare(ends)
print(sorted(opt.why_not_fused()) == sorted(name for name, _ in model.named_parameters()))
"""
    assert together(code, tmp_path) == ["True"] * 2


def test_state_dicts_of_distributed_checkpoints(tmp_path):
    """Saved from torch's class and loaded into ours, and the other way around. Loading itself takes a step with lr 0.

    A checkpoint of torch's class lacks our arguments, so the planner has to allow missing keys.
    """
    code = """
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

def build(cls):
    model = DistributedDataParallel(network())
    return model, cls(model.parameters(), **GIVEN)

want, opt = build(CLASSES[0])
train(want, opt, 6)
for first, second in (CLASSES, CLASSES[::-1], CLASSES[1:] * 2):
    folder = os.path.join(os.environ["SHARED"], first.__module__ + second.__module__)
    model, opt = build(first)
    train(model, opt)
    weights, state = get_state_dict(model, opt)
    checkpoint.save({"model": weights, "opt": state}, checkpoint_id=folder)
    other, opt = build(second)
    weights, state = get_state_dict(other, opt)
    planner = DefaultLoadPlanner(allow_partial_load=first is not second)
    checkpoint.load({"model": weights, "opt": state}, checkpoint_id=folder, planner=planner)
    set_state_dict(other, opt, model_state_dict=weights, optim_state_dict=state)
    train(other, opt, first=3)
    compare([list(want.parameters()), list(other.parameters())])
print(opt.why_not_fused())
"""
    assert together(code, tmp_path) == ["{}"] * 2


# ------------------------------------------------------------------------------------------ in this process
def data():
    torch.manual_seed(1)
    return torch.utils.data.DataLoader(torch.randn(12, 6, dtype=torch.float64), batch_size=4)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 4)).double()


def assert_same_end(ends):
    for got, want in zip(ends[1].parameters(), ends[0].parameters(), strict=True):
        assert_same_numbers(got, want, 1e-10)  # rounding in one step affects the next gradient


@pytest.mark.filterwarnings("ignore")  # their own warnings
def test_accelerate(tmp_path, left):
    accelerate = pytest.importorskip("accelerate")
    ends = []
    for cls in (torch.optim.RMSprop, RMSprop):
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        opt = cls(model.parameters(), lr=1e-2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 2)
        model, opt, batches, scheduler = accelerator.prepare(model, opt, data(), scheduler)
        left.clear()
        for batch in batches:
            opt.zero_grad()
            accelerator.backward(model(batch).square().sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
            assert not opt.step_was_skipped
        assert bool(left) == (cls is not RMSprop)
        accelerator.save_state(str(tmp_path / cls.__module__))
        accelerator.load_state(str(tmp_path / cls.__module__))
        accelerator.free_memory()
        ends.append(model)
    assert_same_end(ends)


@pytest.mark.filterwarnings("ignore")  # their own warnings
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_lightning(precision, tmp_path, left):
    """It clips gradients only for optimizers that do not claim to handle the scale."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, cls):
            super().__init__()
            self.net, self.cls = network(), cls

        def training_step(self, batch, index):
            return self.net(batch.to(self.net[0].weight.dtype)).square().sum()

        def configure_optimizers(self):
            opt = self.cls(self.parameters(), lr=1e-2, momentum=0.9)
            return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.StepLR(opt, 1)}

    ends = []
    for cls in (torch.optim.RMSprop, RMSprop):
        off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=2, precision=precision, gradient_clip_val=1.0,
            enable_checkpointing=False, default_root_dir=tmp_path, **off,
        )  # fmt: skip  # arguments, read as one
        module = Module(cls)
        left.clear()
        trainer.fit(module, data())
        assert bool(left) == (cls is not RMSprop)
        trainer.save_checkpoint(tmp_path / "checkpoint")
        ends.append(module)
    for got, want in zip(ends[1].parameters(), ends[0].parameters(), strict=True):
        assert_same_numbers(got, want, 1e-10 if precision == "64-true" else 1e-4)
