"""The model of a recipe, built without memory, and its parameters."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from digits.model import build_digits_model
from loading import NOT_QUANTIZED
from torch import nn
from training_parameters import choose_parameters, count, counted_parameters
from transformers.initialization import no_init_weights

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration

from .step_memory import fake_tensors


BYTES_PER_WEIGHT = {"4bit": 0.5, "8bit": 1.0}  # of quantized weights
BYTES_OF_SCALES = {"4bit": 1 / 64 + 4 / (64 * 256), "8bit": 0.0}  # per weight: blocks of 64, their scales in 8 bits


def read_config(arguments) -> VisualChatConfig:
    """The configuration of a recipe's model: a checkpoint, a file, or that of the digits demo."""
    if arguments.model is None:
        options = {"projector_type": arguments.projector_type or "linear", **arguments.attention}
        return build_digits_model(**options)[0].config
    return VisualChatConfig.from_pretrained(arguments.model, **arguments.attention)


def build_model(config: VisualChatConfig, arguments, dtype: torch.dtype | None = None) -> Any:
    """
    The model of a recipe with fake tensors, trained and quantized as the recipe says, in training mode.

    Args:
        config (`VisualChatConfig`): Its configuration.
        arguments (`FinetuneArguments`): Those of the recipe.
        dtype (`torch.dtype`, *optional*): Of all weights; by default float32 where they are trained, and the recipe's
            `frozen_dtype` elsewhere.
    """
    with torch.device("meta"), no_init_weights():
        model = VisualChatForConditionalGeneration(config)
        cast(model, dtype or getattr(torch, arguments.frozen_dtype if arguments.model is not None else "float32"))
        if arguments.quantization is not None:
            quantize(model, arguments.quantization)
        if arguments.model is not None:  # the digits demo trains all parameters
            model = choose_parameters(model, arguments, casts=dtype is None)
    if dtype is not None:
        cast(model, dtype)  # what PEFT adds
    make_fake(model)
    return model.train()


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters; buffers stay as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def make_fake(model: nn.Module) -> None:
    """Replaces the parameters and buffers on the meta device by fake tensors on a CPU; shared ones stay shared."""
    known: dict[int, tuple] = {}  # with the original, so that no other one gets its id

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in known:
            new = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                new.__dict__.update(tensor.__dict__)
            known[id(tensor)] = (new, tensor)
        return known[id(tensor)][0]

    with fake_tensors():
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                store.update({name: fake(each) for name, each in store.items() if each is not None})


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight has another form, and is brought to the dtype of its input in every pass."""

    def __init__(self, layer: nn.Linear, quantization: str):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        size = layer.weight.numel()
        weight = torch.empty(int(size * BYTES_PER_WEIGHT[quantization]), 1, dtype=torch.uint8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=layer.weight.shape)
        self.scales = nn.Buffer(torch.empty(int(size * BYTES_OF_SCALES[quantization]), dtype=torch.uint8))
        self.bias = layer.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
        outputs = _QuantizedProduct.apply(states.to(dtype), self.weight, self.out_features).to(states.dtype)
        return outputs if self.bias is None else outputs + self.bias


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, out_features: int) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = (out_features, states.shape[-1])
        return nn.functional.linear(states, weight.new_empty(ctx.shape, dtype=states.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.new_empty(ctx.shape, dtype=gradient.dtype), None, None


def quantize(model: VisualChatForConditionalGeneration, quantization: str) -> None:
    """Quantizes the linear layers of the decoder."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.startswith(tuple(NOT_QUANTIZED)):
            model.set_submodule(path, QuantizedLinear(module, quantization))


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model, as numbers and as bytes."""

    total: int
    trained: int
    frozen_bytes: int  # as loaded, quantized weights and buffers too
    largest_layer: int  # parameters of the largest layer, which are gathered together
    hidden_size: int

    @classmethod
    def of(cls, model: Any) -> "Parameters":
        """Those of a model as it is loaded."""
        parameters = [each for _, each in counted_parameters(model)]
        originals = [each for name, each in model.named_parameters() if ".original_module." in name]
        frozen = [each for each in (*parameters, *originals, *model.buffers()) if not each.requires_grad]
        layers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
        units = [*(each for layer in layers for each in layer), *tables]
        return cls(
            total=sum(map(count, parameters)),
            trained=sum(count(each) for each in parameters if each.requires_grad),
            frozen_bytes=sum(each.nbytes for each in frozen),
            largest_layer=max(sum(map(count, unit.parameters())) for unit in units),
            hidden_size=model.config.text_config.hidden_size,
        )


def count_parameters(config: VisualChatConfig) -> dict[str, int]:
    """The number of parameters of each part, of the whole, and of what is trained by default."""
    with torch.device("meta"):
        model = VisualChatForConditionalGeneration(config).set_trainable()

    def number(*modules: nn.Module) -> int:
        return sum(parameter.numel() for parameter in {p for module in modules for p in module.parameters()})

    parts = model.model
    return {
        "vision tower": number(parts.vision_tower),
        "projector": number(parts.multi_modal_projector),
        "language model": number(parts.language_model, model.lm_head),
        "total": number(model),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }
