"""How a graph runs in onnxruntime and OpenVINO, and an array in torch, without a copy inside the timed call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

import headway as hw

from .harness import Array, Candidate, LeftOut

THREADS = hw.get_num_threads()


def as_torch(x: Array) -> Any:
    """Share an array with torch, which has no door for NumPy's bfloat16."""
    import torch

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def from_torch(x: Any) -> Array:
    """Return a tensor as NumPy has it."""
    import torch

    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def keeping(model: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments by which a model of transformers keeps keys and values; their name differs by version."""
    parameters = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache, "use_cache": True}


def onnxruntime_candidate(
    nodes: list[Any],
    feeds: dict[str, Array],
    out: Array,
    *,
    constants: dict[str, Array] | None = None,
    in_place: dict[str, str] | None = None,
    layout: Callable[[Array], Array] = np.asarray,
) -> Candidate:
    """Run nodes whose result is named ``y``; inputs and outputs are bound once.

    ``constants`` become part of the model, so that it can pack them; ``in_place`` names outputs that share the
    memory of an input, as a cache does.
    """
    import onnxruntime as ort
    from onnx import helper

    ort.set_default_logger_severity(4)  # a refusal is reported in our table
    kind = helper.np_dtype_to_tensor_dtype
    inputs = [helper.make_tensor_value_info(name, kind(x.dtype), x.shape) for name, x in feeds.items()]
    names = {"y": out.dtype, **{name: feeds[source].dtype for name, source in (in_place or {}).items()}}
    outputs = [helper.make_tensor_value_info(name, kind(dtype), None) for name, dtype in names.items()]
    weights = [
        helper.make_tensor(name, kind(x.dtype), x.shape, x.tobytes(), raw=True) for name, x in (constants or {}).items()
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "benchmark", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)],
        ir_version=11,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in {**feeds, "y": out}.items()}
    for name in feeds:
        binding.bind_ortvalue_input(name, values[name])
    binding.bind_ortvalue_output("y", values["y"])
    for name, source in (in_place or {}).items():
        binding.bind_ortvalue_output(name, values[source])
    return Candidate(lambda: session.run_with_iobinding(binding), lambda _: layout(values["y"].numpy()))


def openvino_candidate(
    results: list[Any],
    inputs: list[Any],
    feeds: Iterable[Array],
    *,
    assigns: Iterable[Any] = (),
    state: Callable[[], dict[str, Array]] | None = None,
    runs_per_reset: int = 0,
    layout: Callable[[Array], Array] = np.asarray,
) -> Candidate:
    """Run an OpenVINO graph on the CPU, in the precision of its inputs, with their memory shared.

    The default precision on this kind of processor is bfloat16, whatever the inputs are; here float32 stays
    float32. ``state`` gives the state variables their first values, before each turn.
    """
    import openvino as ov

    arrays = list(feeds)
    precision = "bf16" if arrays[0].dtype.name == "bfloat16" else "f32"
    model = ov.Model([ov.opset13.result(x) for x in results], list(assigns), inputs)
    config = {
        "INFERENCE_NUM_THREADS": THREADS,
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": openvino_type(arrays[0]),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    for place, x in enumerate(arrays):
        request.set_input_tensor(place, openvino_tensor(x))

    def reset() -> None:
        first = state() if state else {}
        for variable in request.query_state():
            variable.state = openvino_tensor(first[variable.name])

    def output(_: Any) -> Array:
        tensor = request.get_output_tensor(0)
        data = tensor.data.view(arrays[0].dtype) if tensor.element_type == ov.Type.bf16 else tensor.data
        return layout(data)

    if state:
        reset()
    run = partial(request.infer, share_inputs=True, share_outputs=True)
    return Candidate(run, output, reset if state else None, runs_per_reset)


def openvino_type(x: Array) -> Any:
    """Return OpenVINO's name of an array's element type."""
    import openvino as ov

    if x.dtype == np.float64:
        raise LeftOut("computes float64 in float32")
    return ov.Type.bf16 if x.dtype.name == "bfloat16" else ov.Type(x.dtype)


def openvino_tensor(x: Array) -> Any:
    """Share an array with OpenVINO."""
    import openvino as ov

    if x.dtype.name == "bfloat16":
        return ov.Tensor(x.view(np.uint16), ov.Shape(x.shape), ov.Type.bf16)
    return ov.Tensor(x, shared_memory=True)
