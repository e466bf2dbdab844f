"""What from_preset refuses, with the framework's names."""

import numpy as np
import pytest
from on_host import one, refused

from rmsprop_gpu import RMSProp
from rmsprop_gpu.conventions.presets import PRESETS, REQUIRED


@pytest.mark.parametrize("name", ["Torch", "", None, ["torch"]])
def test_unknown_preset_lists_those_there_are(name):
    with refused(ValueError, f"no preset {name!r}", *PRESETS, of=[]):
        RMSProp.from_preset(name, one(1))


@pytest.mark.parametrize("name", PRESETS)
def test_argument_that_the_framework_lacks_lists_those_it_has(name):
    for key in (
        "nonsense",
        "params",
        "skip_nonfinite",
        *({"lr", "alpha", "eps", "rho"} - set(PRESETS[name].arguments)),
    ):
        with refused(TypeError, f"{name} has no argument {key!r}", *PRESETS[name].arguments, of=[]):
            RMSProp.from_preset(name, one(1), **{key: 0.1})


@pytest.mark.parametrize(("name", "key"), [("hinton", "lr"), ("tf1", "learning_rate"), ("optax", "learning_rate")])
def test_required_argument_is_missed_by_its_name(name, key):
    with refused(TypeError, f"{key} is missing", name, of=[]):
        RMSProp.from_preset(name, one(1))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("torch", "differentiable", True),
        ("torch", "foreach", 1),
        ("torch", "capturable", None),
        ("keras", "name", 5),
        ("keras", "loss_scale_factor", 1.0),
        ("keras", "gradient_accumulation_steps", 2),
        ("keras", "ema_overwrite_frequency", 100),
        ("tf_keras_legacy", "name", 5),
        ("tf1", "use_locking", True),
        ("timm", "caution", True),
        ("timm", "corrected_weight_decay", True),
        ("bitsandbytes", "momentum", 0.9),
        ("bitsandbytes", "centered", True),
        ("bitsandbytes", "optim_bits", 8),
        ("bitsandbytes", "optim_bits", np.array([32])),
        ("bitsandbytes", "min_8bit_size", 1),
        ("bitsandbytes", "alpha", 0),
        ("tf_keras_legacy", "clipvalue", 0),
    ],
)
def test_what_is_not_done_here_is_refused(name, key, value):
    needed = {k: 0.1 for k, x in PRESETS[name].arguments.items() if x is REQUIRED}
    with refused(ValueError, f"{key} is {value!r}", "wanted", of=[]):
        RMSProp.from_preset(name, one(1), **needed, **{key: value})


@pytest.mark.parametrize(
    ("name", "given", "kind", "text"),
    [
        ("keras", {"rho": 1.5}, ValueError, "rho is 1.5; wanted a number with 0 <= rho < 1"),
        ("keras", {"rho": "alpha"}, TypeError, "rho is 'alpha' (a str); wanted a number with 0 <= rho < 1"),
        ("keras", {"learning_rate": -1}, ValueError, "learning_rate is -1; wanted a finite number >= 0"),
        ("keras", {"epsilon": None}, TypeError, "epsilon is None"),
        ("optax", {"learning_rate": 0.1, "decay": 1}, ValueError, "decay is 1; wanted a number with 0 <= decay < 1"),
        ("optax", {"learning_rate": "lr"}, TypeError, "learning_rate is 'lr' (a str); wanted"),
        ("timm", {"decoupled_decay": 1}, TypeError, "decoupled_decay is 1 (a int); wanted True or False"),
        ("tf_keras_legacy", {"decay": -0.1}, ValueError, "decay is -0.1; wanted a finite number >= 0"),
        ("tf_keras_legacy", {"decay": "lr"}, TypeError, "decay is 'lr' (a str); wanted a finite number >= 0"),
        ("tf_keras_legacy", {"decay": None}, TypeError, "decay is None"),
        ("tf_keras_legacy", {"decay": 0.1, "rho": 2}, ValueError, "rho is 2; wanted a number with 0 <= rho < 1"),
        ("keras", {"decay": 0.1}, TypeError, "has no argument 'decay'; it belongs to tf.keras up to 2.10, the preset"),
        ("keras", {"name": "wrapper", "inner_optimizer": {}}, TypeError, 'config["inner_optimizer"]["config"]'),
        ("chainer", {"eps_inside_sqrt": None}, TypeError, "eps_inside_sqrt is None"),
        ("torch", {"alpha": 2}, ValueError, "alpha is 2; wanted a number with 0 <= alpha < 1"),
        ("torch", {"weight_decay": -1}, ValueError, "weight_decay is -1"),
        # Only the parameters' dtype decides these
        ("keras", {"epsilon": 1e-60}, ValueError, "epsilon is 1e-60, which is 0 in float32"),
        ("tf1", {"learning_rate": 1, "decay": 1 - 1e-9}, ValueError, "decay is 0.999999999, which is 1 in float32; "
         "wanted decay < 1"),
        ("keras", {"learning_rate": 1e20, "weight_decay": 1e20}, ValueError, "learning_rate * weight_decay is "),
    ],
)  # fmt: skip
def test_wrong_value_is_named_as_the_framework_does(name, given, kind, text):
    param = one(1)
    with refused(kind, text, of=[param]):
        RMSProp.from_preset(name, param, **given)


def test_wrong_parameter_is_refused_in_the_usual_words():
    with refused(TypeError, "params[0] is a float; wanted", of=[]):
        RMSProp.from_preset("keras", [1.0])
    with refused(ValueError, "params[0]: alpha is 2; wanted", of=[]):  # groups have our names
        RMSProp.from_preset("keras", [{"params": one(1), "alpha": 2}])


def test_optax_centered_with_bias_correction_is_refused_and_ours_offered():
    given = {"learning_rate": 0.1, "centered": True, "bias_correction": True, "momentum": 0.5}
    with pytest.raises(ValueError, match=r"centered and bias_correction are True.*0/0 or up to 1e8") as error:
        RMSProp.from_preset("optax", one(1), **given)
    offered = str(error.value).rpartition(": ")[2]
    ours = eval(offered, {"RMSProp": RMSProp, "params": one(1)}).param_groups[0].hyper()
    del given["bias_correction"]
    want = RMSProp.from_preset("optax", one(1), **given).param_groups[0].hyper()
    assert ours == {**want, "bias_correction": True}


def test_clips_that_exclude_each_other():
    with refused(ValueError, "clipnorm and global_clipnorm", "at most one", of=[]):
        RMSProp.from_preset("tf_keras_legacy", one(1), clipnorm=1.0, global_clipnorm=1.0)
    with refused(ValueError, "clipnorm and clipvalue are given (clipnorm=1.0, clipvalue=0.0)", of=[]):
        RMSProp.from_preset("keras", one(1), clipnorm=1.0, clipvalue=0.0)


@pytest.mark.parametrize("norm", ["clipnorm", "global_clipnorm"])
def test_two_clips_one_after_the_other_are_refused(norm):
    texts = f"clipvalue and {norm} are given (clipvalue=0.5, {norm}=1.0)", "by value and then by norm", "clips once"
    with refused(ValueError, *texts, of=[]):
        RMSProp.from_preset("tf_keras_legacy", one(1), clipvalue=0.5, **{norm: 1})
