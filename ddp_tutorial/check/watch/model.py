"""What is wrapped, called, differentiated and stepped."""

from collections import Counter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ddp_tutorial.check.made_up import gpus
from ddp_tutorial.check.watch import calls, samples
from ddp_tutorial.check.watch.record import emit, fingerprint, random_states, safely, user_line

SMALL, ALWAYS = 100_000, 1000  # the weights of a small model are hashed in its first thousand steps
FIRST = 16  # those of another one in the first steps, and then more and more seldom
COMPARED = 20  # forwards whose inputs are hashed

wrapped: WeakIdKeyDictionary = WeakIdKeyDictionary()  # plain model -> its number
names: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> (its name, whether it needed a gradient at the wrap)
optimizers: WeakKeyDictionary = WeakKeyDictionary()  # optimizer -> [its number, steps so far]
since_backward: Counter = Counter()  # calls of the models since the last backward
since_step: Counter = Counter()
plain_line: list = []  # where a wrapped model was last called past its wrapper
exchanges = [True]  # whether the last forward was outside of no_sync
n_dropouts = [0]
n_inputs = [0]


def wraps(ddp, module: nn.Module, *args, **kwargs) -> None:
    number = wrapped.setdefault(module, len(wrapped))
    rows = [[name, list(p.shape), p.requires_grad] for name, p in module.named_parameters()]
    for (name, _, needed), parameter in zip(rows, module.parameters(), strict=True):
        names[parameter] = (f"{number}:{name}" if number else name, needed)
    kinds = Counter(type(m).__name__ for m in module.modules())
    norms = 0 if gpus.has_synced_norms[0] else sum(n for kind, n in kinds.items() if kind.startswith("BatchNorm"))
    group, mesh = kwargs.get("process_group"), kwargs.get("device_mesh")
    whole = calls.is_whole(group if mesh is None else mesh.get_group())
    unused = bool(kwargs.get("find_unused_parameters"))
    emit("wrap", model=number, names=rows, norms=norms, unused=unused, whole=whole)


def has_wrapped(result, ddp, module: nn.Module, *args, **kwargs) -> None:
    weights = {name: fingerprint(p) for name, p in module.named_parameters()}
    emit("wrapped", model=wrapped[module], weights=weights)


def forward(ddp, *args, **kwargs) -> None:
    sends = ddp.require_forward_param_sync and ddp.will_sync_module_buffers()
    grad = torch.is_grad_enabled()
    emit("forward", loops=True, train=ddp.training, grad=grad, sends_buffers=bool(sends))
    since_backward["forwards"] += grad
    exchanges[0] = ddp.require_backward_grad_sync
    if not grad:
        samples.validates()
    elif ddp.training and n_inputs[0] < COMPARED:
        n_inputs[0] += 1
        given = calls.tensors_in((*args, *kwargs.values()))[:1]
        emit("input", tensor=fingerprint(given[0]) if given and is_dense(given[0]) else None)


def is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def any_forward(module: nn.Module, inside_ddp: bool) -> None:
    """A call of any module; of interest is that of a wrapped model past its wrapper."""
    if module in wrapped and not inside_ddp:
        if not torch.is_grad_enabled():
            samples.validates()
        elif module.training:
            since_backward["plain"] += 1
            plain_line[:] = [user_line()]


def factors(loss: Tensor) -> list[float]:
    """The constants by which the last operations have multiplied `loss`."""
    constants, node = [], loss.grad_fn
    while node is not None and len(constants) < 5 and node.name() in ("DivBackward0", "MulBackward0"):
        other = node._saved_other
        if other is None or other.numel() != 1 or other.requires_grad:
            break
        constants.append(float(other) if node.name()[0] == "M" else 1 / float(other))
        node = node.next_functions[0][0]
    return constants


def backward(tensors, *args, **kwargs) -> None:
    loss = tensors if isinstance(tensors, Tensor) else tensors[0]
    value = float(loss.detach()) if loss.numel() == 1 else None
    facts = {"forwards": since_backward["forwards"], "plain": since_backward["plain"]}
    line = {"plain_at": plain_line[0]} if facts["plain"] and plain_line else {}
    emit("backward", loops=True, loss=repr(value), factors=factors(loss), exchanges=exchanges[0], **facts, **line)
    since_backward.clear()
    since_step["backwards"] += 1
    samples.trains()


def label(i: int, parameter: Tensor) -> tuple[str, bool]:
    return names.get(parameter, (f"{list(parameter.shape)} #{i}, not of a DDP model", True))


def parameters_of(optimizer) -> dict[str, tuple[Tensor, bool]]:
    """Name -> (weight, whether it needed a gradient at the wrap)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    labels = [label(i, p) for i, p in enumerate(parameters)]
    return {name: (p, needed) for (name, needed), p in zip(labels, parameters, strict=True)}


def is_hashed(n: int, parameters: dict) -> bool:
    size = sum(p.numel() for p, _ in parameters.values())
    return n < FIRST or n & (n - 1) == 0 or (size <= SMALL and n < ALWAYS)


def before_step(optimizer, args, kwargs) -> None:
    number, n = optimizers.setdefault(optimizer, [len(optimizers), 0])
    parameters = parameters_of(optimizer)
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    event = {"optimizer": number, "n": n, "lr": rates, "backwards": since_step.pop("backwards", 0)}
    if is_hashed(n, parameters):
        gradients = {name: p.grad for name, (p, _) in parameters.items()}
        event["gradients"] = {name: fingerprint(gradient) for name, gradient in gradients.items()}
        event["weights"] = {name: fingerprint(p) for name, (p, _) in parameters.items()}
        given = [gradient for gradient in gradients.values() if gradient is not None]
        event["zero"] = bool(given) and not any(bool(gradient.any()) for gradient in given)
        event["unfrozen"] = [x for x, (p, needed) in parameters.items() if p.grad is not None and not needed]
        event["partial"] = any("ZeroRedundancy" in t.__name__ for t in type(optimizer).__mro__)
        held = {id(p) for p, _ in parameters.values()}
        event["missing"] = [name for p, (name, needed) in names.items() if needed and id(p) not in held]
    emit("step", loops=True, **event)


def after_step(optimizer, args, kwargs) -> None:
    number, n = optimizers[optimizer]
    optimizers[optimizer][1] += 1
    parameters = parameters_of(optimizer)
    if is_hashed(n, parameters):
        emit("stepped", optimizer=number, n=n, weights={name: fingerprint(p) for name, (p, _) in parameters.items()})


def final() -> None:
    """The weights at the end of the process."""
    for optimizer, (number, n) in list(optimizers.items()):
        weights = {name: fingerprint(p) for name, (p, _) in parameters_of(optimizer).items()}
        emit("final", optimizer=number, n=n, weights=weights)


def clipped(norm, *args, **kwargs) -> None:
    emit("clip", norm=repr(float(norm)), since=since_step["backwards"])


def clips_values(original, parameters, *args, **kwargs):
    """`clip_grad_value_`, which returns no norm: that of before."""
    parameters = parameters if isinstance(parameters, Tensor) else list(parameters)  # it may give them but once
    safely(values_clipped, parameters)
    return original(parameters, *args, **kwargs)


def values_clipped(parameters: Tensor | list[Tensor]) -> None:
    gradients = [p.grad for p in calls.tensors_in([parameters]) if p.grad is not None]
    norms = [gradient.float().norm().cpu() for gradient in gradients if not hasattr(gradient, "full_tensor")]
    if norms:  # that of a sharded gradient would need a collective
        clipped(torch.stack(norms).norm())


def scales(scaler, *args, **kwargs) -> None:
    emit("scale", scale=scaler.get_scale())


def scheduled(schedule, *args, **kwargs) -> None:
    emit("schedule", what=type(schedule).__name__)


def plateau(schedule, metrics, *args, **kwargs) -> None:
    emit("plateau", metric=repr(float(metrics)))


def loads(thing, *args, **kwargs) -> None:
    emit("load", what=type(thing).__name__)


def drops(input, p=0.5, training=True, *args, **kwargs) -> None:
    if training and p and n_dropouts[0] < 20:
        n_dropouts[0] += 1
        emit("dropout", state=[random_states(input.device)[0], gpus.seed[0]])


def attends(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs) -> None:
    if dropout_p:
        drops(query)
