"""Each framework's RMSProp as a formula, written from the source that its preset names.

The formulas keep the framework's order of operations and names, and share nothing with the package or each other. Each
gets a parameter, its gradient and a state dict, empty at first, and returns the new parameter. Keywords are all of the
framework's arguments, with its defaults. The "all" entry of the state holds the step's gradients of all parameters.
"""

import numpy as np


def hinton(p, g, s, *, lr, alpha=0.9):
    s["ms"] = alpha * s.get("ms", 0.0) + (1 - alpha) * g**2
    return p - lr * np.divide(g, np.sqrt(s["ms"]), out=np.zeros_like(g), where=s["ms"] != 0)


def graves(p, g, s, *, lr=1e-4, alpha=0.95, momentum=0.9, eps=1e-4):
    s["n"] = alpha * s.get("n", 0.0) + (1 - alpha) * g**2
    s["g"] = alpha * s.get("g", 0.0) + (1 - alpha) * g
    s["delta"] = momentum * s.get("delta", 0.0) - lr * g / np.sqrt(s["n"] - s["g"] ** 2 + eps)
    return p + s["delta"]


def torch(p, g, s, *, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False, capturable=False,
          foreach=None, maximize=False, differentiable=False):  # fmt: skip
    g = -g if maximize else g
    g = g + weight_decay * p
    s["square_avg"] = s.get("square_avg", 0.0) * alpha + (1 - alpha) * g * g
    avg = s["square_avg"]
    if centered:
        mean = s.get("grad_avg", 0.0)
        s["grad_avg"] = mean + (1 - alpha) * (g - mean)  # lerp_
        avg = avg - s["grad_avg"] * s["grad_avg"]
    avg = np.sqrt(avg) + eps
    if momentum > 0:
        s["momentum_buffer"] = momentum * s.get("momentum_buffer", 0.0) + g / avg
        return p - lr * s["momentum_buffer"]
    return p - lr * g / avg


def keras(p, g, s, *, learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False, weight_decay=None,
          clipnorm=None, clipvalue=None, global_clipnorm=None, use_ema=False, ema_momentum=0.99,
          ema_overwrite_frequency=None, loss_scale_factor=None, gradient_accumulation_steps=None,
          name=None):  # fmt: skip
    g = clipped(g, clipvalue, clipnorm, global_clipnorm, s["all"])
    p = p - p * weight_decay * learning_rate if weight_decay is not None else p
    s["velocity"] = rho * s.get("velocity", 0.0) + (1 - rho) * g**2
    denominator = s["velocity"] + epsilon
    if centered:
        s["average_gradient"] = rho * s.get("average_gradient", 0.0) + (1 - rho) * g
        denominator = s["velocity"] - s["average_gradient"] ** 2 + epsilon
    increment = learning_rate * g / np.sqrt(denominator)
    if momentum > 0:
        increment = s["momentum"] = momentum * s.get("momentum", 0.0) + increment
    p = p - increment
    if use_ema:
        kept = (s.get("iterations", 0) != 0) * ema_momentum
        s["average"] = kept * s.get("average", 0.0) + (1 - kept) * p
        s["iterations"] = s.get("iterations", 0) + 1
    return p


def clipped(g, clipvalue, clipnorm, global_clipnorm, every):
    """As in Keras and TensorFlow."""
    if clipvalue is not None:
        return np.clip(g, -clipvalue, clipvalue)
    if clipnorm is not None:
        return g * clipnorm / np.maximum(np.sqrt(np.sum(g**2)), clipnorm)
    if global_clipnorm is not None:
        norm = np.sqrt(sum(np.sum(x**2) for x in every))
        return g * (global_clipnorm * np.minimum(1 / norm, 1 / global_clipnorm))
    return g


def tf1(p, g, s, *, learning_rate, decay=0.9, momentum=0.0, epsilon=1e-10, use_locking=False, centered=False,
        name="RMSProp"):  # fmt: skip
    s["ms"] = s.get("ms", 1.0) + (g**2 - s.get("ms", 1.0)) * (1 - decay)
    denom = s["ms"] + epsilon
    if centered:
        s["mg"] = s.get("mg", 0.0) + (g - s.get("mg", 0.0)) * (1 - decay)
        denom = denom - s["mg"] ** 2
    s["mom"] = s.get("mom", 0.0) * momentum + g * learning_rate / np.sqrt(denom)
    return p - s["mom"]


def tf_keras_legacy(p, g, s, *, learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False,
                    name="RMSprop", clipnorm=None, clipvalue=None, global_clipnorm=None, lr=None,
                    decay=0.0):  # fmt: skip
    learning_rate = learning_rate if lr is None else lr
    learning_rate = learning_rate / (1 + decay * s.get("iterations", 0))
    s["iterations"] = s.get("iterations", 0) + 1
    epsilon = epsilon or 1e-7
    g = clipped(g, clipvalue, clipnorm, global_clipnorm, s["all"])
    if momentum > 0:
        s.setdefault("ms", 0.0)  # the slot "rms", zeros here
        return tf1(p, g, s, learning_rate=learning_rate, decay=rho, momentum=momentum, epsilon=epsilon,
                   centered=centered)  # fmt: skip
    denom = s["rms"] = rho * s.get("rms", 0.0) + (1 - rho) * g**2
    if centered:
        s["mg"] = rho * s.get("mg", 0.0) + (1 - rho) * g
        denom = s["rms"] - s["mg"] ** 2
    return p - learning_rate * g / (np.sqrt(denom) + epsilon)


def optax(p, g, s, *, learning_rate, decay=0.9, eps=1e-8, initial_scale=0.0, eps_in_sqrt=True, centered=False,
          momentum=None, nesterov=False, bias_correction=False):  # fmt: skip
    s["count"] = s.get("count", 0) + 1
    s["nu"] = (1 - decay) * g**2 + decay * s.get("nu", initial_scale)
    n = s["nu"] / (1 - decay ** s["count"]) if bias_correction else s["nu"]
    if centered:
        s["mu"] = (1 - decay) * g + decay * s.get("mu", 0.0)
        n = n - s["mu"] ** 2
    scaling = 1 / np.sqrt(n + eps) if eps_in_sqrt else 1 / (np.sqrt(n) + eps)
    update = -learning_rate * (scaling * g)
    if momentum is not None:
        s["trace"] = update + momentum * s.get("trace", 0.0)
        update = update + momentum * s["trace"] if nesterov else s["trace"]
    return p + update


def timm(p, g, s, *, lr=1e-2, alpha=0.9, eps=1e-10, weight_decay=0, momentum=0.0, centered=False,
         decoupled_decay=False, corrected_weight_decay=False, lr_in_momentum=True, caution=False,
         foreach=None):  # fmt: skip
    if decoupled_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    s["square_avg"] = s.get("square_avg", 1.0) + (1 - alpha) * (g**2 - s.get("square_avg", 1.0))
    avg = s["square_avg"]
    if centered:
        s["grad_avg"] = s.get("grad_avg", 0.0) + (1 - alpha) * (g - s.get("grad_avg", 0.0))
        avg = avg - s["grad_avg"] ** 2
    avg = np.sqrt(avg + eps)
    if momentum > 0 and lr_in_momentum:
        s["buf"] = s.get("buf", 0.0) * momentum + lr * g / avg
        return p - s["buf"]
    if momentum > 0:
        s["buf"] = s.get("buf", 0.0) * momentum + g / avg
        return p - lr * s["buf"]
    return p - lr * g / avg


def chainer(p, g, s, *, lr=0.01, alpha=0.99, eps=1e-8, eps_inside_sqrt=False):
    s["ms"] = s.get("ms", 0.0) * alpha + (1 - alpha) * g * g
    return p - lr * g / (np.sqrt(s["ms"] + eps) if eps_inside_sqrt else np.sqrt(s["ms"]) + eps)


def bitsandbytes(p, g, s, *, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False, optim_bits=32,
                 args=None, min_8bit_size=4096):  # fmt: skip
    g = g + weight_decay * p
    s["state1"] = s.get("state1", 0.0) * alpha + (1 - alpha) * g * g
    return p - lr * (g / (np.sqrt(s["state1"]) + eps))


FORMULAS = {
    f.__name__: f
    for f in (hinton, graves, torch, keras, tf_keras_legacy, tf1, optax, timm, chainer, bitsandbytes)
}  # fmt: skip
