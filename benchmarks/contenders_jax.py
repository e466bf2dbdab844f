"""optax and Keras under JAX, on the CPU: the whole model in one jit, which is given its arrays to reuse.

JAX has no setting for its threads: it starts one a core that the process may use, and the worker sees to those.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contenders_base import ALPHA, EPS, LR, Array, Contender, Running, Task, flat
from benchmarks.workloads import OPTAX


def build_optax(task: Task) -> Running:
    """optax.rmsprop, with eps where we have it."""
    import jax.numpy as jnp
    import optax

    task.refuse_beyond(("global_clipnorm",))
    opt = optax.rmsprop(LR, decay=ALPHA, eps=EPS, eps_in_sqrt=False)
    if most := task.hyper.get("global_clipnorm"):
        opt = optax.chain(optax.clip_by_global_norm(most), opt)
    params = [jnp.array(param) for param in task.params]

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jitted(update, params, opt.init(params), task.grads)


def build_keras(task: Task) -> Running:
    """keras.optimizers.RMSprop, which has eps inside the root."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    task.refuse_beyond()
    opt = keras.optimizers.RMSprop(learning_rate=LR, rho=ALPHA, epsilon=EPS)
    variables = [keras.Variable(param) for param in task.params]
    opt.build(variables)

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return opt.stateless_apply(state, grads, params)

    return jitted(update, [each.value for each in variables], [each.value for each in opt.variables], task.grads)


def jitted(update: Callable[..., tuple[Any, Any]], params: Any, state: Any, grads: list[Array]) -> Running:
    """Steps of ``params, state = update(params, state, grads)``; the old params and state become the new."""
    import jax
    import jax.numpy as jnp

    update = jax.jit(update, donate_argnums=(0, 1))
    kept = {"params": params, "state": state, "grads": [jnp.array(grad) for grad in grads]}

    def step() -> None:
        kept["params"], kept["state"] = update(kept["params"], kept["state"], kept["grads"])

    return Running(
        step=step,
        set_grads=lambda new: kept.update(grads=[jnp.array(grad) for grad in new]),
        read_params=lambda: flat([np.asarray(param) for param in kept["params"]]),
        sync=lambda: jax.block_until_ready((kept["params"], kept["state"])),
    )


OPTAX_RMSPROP = Contender(OPTAX, build_optax)
KERAS = Contender("keras", build_keras, switches={"eps_in_sqrt": True})
