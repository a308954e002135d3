"""A CUDA device that is not there, for code that no GPU has run yet: `python pretend_cuda.py MODULE ARGUMENTS`.

Its tensors lie in main memory and are computed there, but say `cuda:0`, and refuse what CUDA's refuse: an operation
with a tensor of the CPU, numpy. So a tensor that somebody forgot to move is found, and results can be held against the
CPU's. Nothing is said about kernels, their speed and their bits. torch calls its support for devices written in Python
experimental: it begins when this module is imported, in a separate process, before what takes names from torch.
"""

import runpy
import sys
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as tree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

CUDA, HIDDEN = torch.device("cuda", 0), "pretended"  # what a tensor says, and torch's own name for the device
CROSSING = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}  # CUDA takes indices that lie on the CPU
MAKERS = {
    getattr(torch, name)
    for name in "tensor as_tensor arange eye linspace randperm zeros ones empty full rand randn randint".split()
}
# What autocast computes in bfloat16.
LOW = {torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, Tensor.__matmul__}
INSIDE = {"storage", "untyped_storage", "_typed_storage", "data_ptr"}


class OnCuda(Tensor):
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCuda":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        own = Tensor._make_wrapper_subclass(cls, inner.size(), device=f"{HIDDEN}:0", **layout)
        own.inner = inner
        return own

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"OnCuda({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, *args, **(kwargs or {}))


def on_cuda(value: Any) -> bool:
    return isinstance(value, OnCuda)


def computed(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation of torch on what lies inside."""
    name, flat = func._schema.name, tree.tree_leaves((args, kwargs))
    own = [value for value in flat if on_cuda(value)]
    others = [value for value in flat if isinstance(value, Tensor) and not on_cuda(value) and value.dim()]
    if own and others and name not in CROSSING | INDEXING:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of tensors on cuda:0 and cpu")
    if own and name in INDEXING and not on_cuda(args[0]):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    device = kwargs.get("device")
    there = torch.device(device).type == HIDDEN if device is not None else bool(own)
    if name == "aten::copy_":
        there = on_cuda(args[0])
    inside, options = tree.tree_map(_inner, (args, kwargs))
    out = func(*inside, **options)
    written = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    if written and isinstance(out, Tensor):
        place, key = written[0]
        target = kwargs[key] if key in kwargs else args[place]
        assert target.shape == out.shape, f"{func}: has resized its output"
        return target
    return tree.tree_map_only(Tensor, OnCuda, out) if there else out


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if on_cuda(value) else value


class Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, onto: bool) -> Tensor:
        ctx.onto = onto
        return OnCuda(x.detach().clone()) if onto else x.inner.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.inner if ctx.onto else OnCuda(grad)), None


def moved(x: Tensor, device: Any) -> Tensor:
    onto = torch.device(device).type == "cuda"
    return x if onto == on_cuda(x) else Move.apply(x, onto)


def to(x: Tensor, *args: Any, **options: Any) -> Tensor:
    """Tensor.to in all its forms."""
    given = [*args, *options.values()]
    other = next((value for value in given if isinstance(value, Tensor)), x)
    device = next((d for d in given if isinstance(d, str | torch.device)), CUDA if on_cuda(other) else "cpu")
    if torch.device(device).type == "meta":
        return x.inner.to("meta") if on_cuda(x) else x.to("meta")
    dtype = next((value for value in given if isinstance(value, torch.dtype)), other.dtype)
    x = moved(x, device)
    return x if x.dtype == dtype else x.to(dtype)


class Pretend(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        if func in MAKERS and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs.pop("pin_memory", None)
            made = func(*args, **kwargs | {"device": "cpu"})
            return OnCuda(made.detach()).requires_grad_(made.requires_grad)
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return to(*args, **kwargs) if func is Tensor.to else moved(first, func.__name__)
        if func is Tensor.backward:  # what is computed again in it must see this device too
            assert not args[1:] and kwargs.keys() <= {"gradient", "retain_graph", "create_graph", "inputs"}
            grad = torch.ones_like(first) if kwargs.get("gradient") is None else kwargs["gradient"]
            with self:
                return _engine_run_backward((first,), (grad,), False, False, (), True, accumulate_grad=True)
        if on_cuda(first):
            asked = getattr(func, "__self__", None)
            if name == "__set__" and asked is Tensor.data:
                first.inner = args[1].inner
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            if func is Tensor.tolist or name in INSIDE:
                return func(first.inner, *args[1:])
            if func is Tensor.__format__:
                return format(first.inner, *args[1:])
            if func is Tensor.__getitem__ and isinstance(args[1], list):
                args = first, OnCuda(torch.tensor(args[1]))
        if func in LOW and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree.tree_map_only(OnCuda, _low, (args, kwargs))
        return func(*args, **kwargs)


def _low(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16) if x.dtype == torch.float32 else x


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Generator(torch._C.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


def install() -> None:
    """Pretend from here on, in the whole process."""
    card = SimpleNamespace(name="Pretended", total_memory=10**11, uuid="0", major=9, minor=0, multi_processor_count=132)
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "is_current_stream_capturing": False,
        "device_count": 2, "current_device": 0, "get_device_name": card.name, "get_device_properties": card,
        "get_device_capability": (9, 0), "mem_get_info": (10**11, 10**11), "max_memory_reserved": 10**9,
        "memory_reserved": 10**9, "max_memory_allocated": 10**9, "memory_allocated": 10**9, "set_device": None,
        "reset_peak_memory_stats": None, "empty_cache": None, "synchronize": None, "_lazy_init": None,
        "manual_seed": None, "manual_seed_all": None, "get_rng_state": state, "set_rng_state": None,
        "get_rng_state_all": [state], "set_rng_state_all": None,
    }  # fmt: skip
    for name, answer in answers.items():
        for module in (torch.cuda, torch.cuda.random):
            if hasattr(module, name):
                setattr(module, name, lambda *_, answer=answer, **__: answer)
    load, load_file = torch.load, safetensors.torch.load_file
    torch.load = lambda file, map_location=None, **options: load(file, map_location="cpu", **options)
    safetensors.torch.load_file = lambda file, device="cpu": {k: moved(v, device) for k, v in load_file(file).items()}
    Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]  # the thread that pins does not pretend
    torch.Generator = Generator  # type: ignore[misc]
    _setup_privateuseone_for_python_backend(HIDDEN, backend_module=Backend())
    install.library = torch.library.Library("_", "IMPL")  # type: ignore[attr-defined]  # ends with its object
    install.library.fallback(computed, "PrivateUse1")  # type: ignore[attr-defined]
    torch.autograd.grad_mode.set_multithreading_enabled(False)  # a thread of the device's own does not pretend
    Pretend().__enter__()


install()
if __name__ == "__main__":
    sys.path.insert(0, "")
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
