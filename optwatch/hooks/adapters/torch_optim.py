"""torch.optim: plain tensors under torch's own names."""

from __future__ import annotations

from optwatch.hooks.adapters.base import Group, Named


def _adam(group: Group) -> str | None:
    if group["amsgrad"]:
        return None
    return "adamw" if group.get("decoupled_weight_decay") else "adam"


def _adamw(group: Group) -> str | None:
    return None if group["amsgrad"] else "adamw"


def _sgd(group: Group) -> str:
    return "sgd_momentum" if group["momentum"] else "sgd"


def _rmsprop(group: Group) -> str:
    return "rmsprop" + "_centered" * bool(group["centered"]) + "_momentum" * bool(group["momentum"])


TORCH = Named(
    "torch.optim",
    {
        "Adam": _adam,
        "AdamW": _adamw,
        "SGD": _sgd,
        "RMSprop": _rmsprop,
        "Adagrad": lambda _: "adagrad",
        "Adadelta": lambda _: "adadelta",
    },
)
