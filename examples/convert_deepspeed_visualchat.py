"""
Converts a checkpoint of the original DeepSpeed-VisualChat (arXiv 2309.14327) to a VisualChat folder.

    python examples/convert_deepspeed_visualchat.py OLD NEW --vision clip-vit-large-patch14 --text Llama-2-7b-hf

OLD is a `pytorch_model.bin` or the folder that holds it. The parts, names on the Hub or folders, are those it was
trained from: they give configurations, tokenizer and image processor, and the weights that OLD lacks. One tensor is in
memory at a time. What happened to each key is in `conversion_report.json` of NEW.
"""

import json
import re
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from checkpoint_files import DTYPE_NAMES, PartWeights, PlannedWeight, read_state_dict, write_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.projector_visualchat import num_heads
from processing_visualchat import VisualChatProcessor
from processing_visualchat.chat_template_visualchat import SYSTEM_INSTRUCTION


# Where a vision tower lies in OLD, by model type.
VISION_PREFIXES = {"clip_vision_model": "vis_encoder.vision_model.", "visualchat_qwen_vision": "vis_encoder."}
# Tokens that the original adds to the tokenizer, in this order; the last only where there is no padding token.
ADDED_TOKENS, PADDING_TOKEN = ["### Image:", "<image>"], "<PAD>"
LEFT_OUT = {  # patterns of keys, with the reason
    r"lang_decoder\.model\.embed_tokens\.weight": "untrained embeddings; the trained ones are lang_embed.weight",
    r".+\.(rotary_emb\.inv_freq|embeddings\.position_ids)": "a buffer, computed from the configuration",
}
FUSED = "a LoRA pair that its weight already contains"
NUM_SHOWN = 5  # faults in an error
BLOCK_SIZE = 2**18  # elements of a weight that are merged at a time

NOTES = """\
Differences from the original that no conversion removes:
- Its code put the images of a sample in reverse order: at "### Image 1:" the model saw the last one. Here they are in
  the order of the text. To repeat what OLD was trained on, pass the images of a conversation in reverse.
- Text before the first image attended to all images that follow, a leak of the future that is not repeated."""

# The instruction format of the original: every round begins a sequence, and the images come before the question.
CHAT_TEMPLATE = """\
{%- set state = namespace(images=0, start=SYSTEM_INSTRUCTION ~ "\\n\\n") -%}
{%- for message in messages -%}
    {%- set content = message["content"] -%}
    {%- if content is string -%}
        {%- set content = [{"type": "text", "text": content}] -%}
    {%- endif -%}
    {%- set text = content | selectattr("type", "equalto", "text") | map(attribute="text") | join("\\n") -%}
    {%- if message["role"] == "system" -%}
        {%- set state.start = text ~ "\\n\\n" -%}
    {%- elif message["role"] == "user" -%}
        {{- (bos_token or "") ~ state.start -}}
        {%- set state.start = "" -%}
        {%- for block in content if block["type"] == "image" -%}
            {%- set state.images = state.images + 1 -%}
            {{- "### Image " ~ state.images ~ ":\\n<image>\\n" ~ ("\\n" if loop.last else "") -}}
        {%- endfor -%}
        {{- "### Question:\\n" ~ text ~ "\\n\\n" if text else "" -}}
        {{- "### Answer:\\n" if add_generation_prompt and loop.last else "" -}}
    {%- else -%}
        {{- "### Answer:\\n" -}}
        {%- if 0 in (message["weight"], message["loss"]) -%}
            {{- text ~ eos_token -}}
        {%- else -%}
            {%- generation -%}{{- text ~ eos_token -}}{%- endgeneration -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Projection:
    """A projector of the original."""

    projector_type: str  # ours
    width_key: str  # of a weight that only it has, with as many columns as the tower's output is wide
    names: dict[str, tuple[str, ...]]  # of each parameter, the keys below `projection.` that are concatenated to it
    # Further fields of the configuration; a `ValueError` for a projector that cannot be carried over exactly.
    fields: Callable[[dict[str, Tensor], PreTrainedConfig], dict] = lambda old, vision_config: {}


def weights_and_biases(modules: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {f"{name}.{kind}": (f"{old}.{kind}",) for name, old in modules.items() for kind in ("weight", "bias")}


def vit_fields(old: dict[str, Tensor], vision_config: PreTrainedConfig) -> dict:
    """The encoder layer of the original has the shape of the tower's layers, ours has one shape for every tower."""
    width = vision_config.hidden_size
    ours = {
        "num_attention_heads": num_heads(width, 64),
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-5,
    }
    for name, value in ours.items():
        if getattr(vision_config, name) != value:
            raise ValueError(
                f"The 'vit' projector of OLD cannot be carried over exactly: its layer has {name}="
                f"{getattr(vision_config, name)} of the vision tower, the 'vit' projector here {value} for a width of "
                f"{width}."
            )
    return {"projector_hidden_act": vision_config.hidden_act}


def perceiver_fields(old: dict[str, Tensor], vision_config: PreTrainedConfig) -> dict:
    """It leaves out the class token."""
    return {"image_seq_length": len(old["projection.query"]), "vision_feature_select_strategy": "default"}


PROJECTIONS = (
    Projection("linear", "projection.0.weight", weights_and_biases({"linear": "0", "norm": "1"})),
    Projection(
        "vit",
        "projection.vis_layer.layer_norm1.weight",
        {
            f"encoder.attention.in_proj_{kind}": tuple(f"vis_layer.self_attn.{part}_proj.{kind}" for part in "qkv")
            for kind in ("weight", "bias")
        }
        | weights_and_biases(
            {
                "encoder.attention_norm": "vis_layer.layer_norm1",
                "encoder.attention.out_proj": "vis_layer.self_attn.out_proj",
                "encoder.mlp_norm": "vis_layer.layer_norm2",
                "encoder.mlp.0": "vis_layer.mlp.fc1",
                "encoder.mlp.2": "vis_layer.mlp.fc2",
                "projection.linear": "projection.0",
                "projection.norm": "projection.1",
            }
        ),
        vit_fields,
    ),
    Projection(
        "perceiver",
        "projection.kv_proj.weight",
        {f"resampler.{name}": (name,) for name in ("query", "pos_embed", "attn.in_proj_weight", "attn.in_proj_bias")}
        | weights_and_biases({f"resampler.{name}": name for name in ("kv_proj", "attn.out_proj", "ln_q", "ln_kv")})
        | weights_and_biases({"norm": "projection.0", "linear": "projection.1"}),
        perceiver_fields,
    ),
)


@dataclass
class Report:
    """What happened to every key of OLD, and which weights it lacked."""

    taken: dict[str, str] = field(default_factory=dict)  # the weight of NEW
    merged: dict[str, str] = field(default_factory=dict)  # the weight of NEW that the LoRA pair is added to
    left_out: dict[str, str] = field(default_factory=dict)  # the reason
    missing: dict[str, str] = field(default_factory=dict)  # by the weight of NEW, the part that it is taken from

    def __str__(self) -> str:
        lines = []
        for group, keys in asdict(self).items():
            lines.append(f"{group.replace('_', ' ')}: {len(keys)} keys")
            for value in sorted(set(keys.values())) if group in ("left_out", "missing") else ():
                same = [key for key in keys if keys[key] == value]
                more = f" and {len(same) - 2} more" if len(same) > 2 else ""
                lines.append(f"    {', '.join(same[:2])}{more} ({value})")
        return "\n".join(lines)


def load_tokenizer(text: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the language model, with the tokens that the original adds."""
    tokenizer = AutoTokenizer.from_pretrained(text)
    has_padding = tokenizer.pad_token is not None
    tokenizer.add_tokens(ADDED_TOKENS if has_padding else [*ADDED_TOKENS, PADDING_TOKEN], special_tokens=True)
    return tokenizer


def find_projection(old: dict[str, Tensor]) -> Projection:
    """The projector of OLD; a `ValueError` if it is none of the table."""
    for projection in PROJECTIONS:
        if projection.width_key in old:
            return projection
    found = [key for key in old if key.startswith("projection.")] or list(old)
    raise ValueError(
        "OLD has no projector of the original, which one of "
        f"{', '.join(projection.width_key for projection in PROJECTIONS)} would tell; it has "
        f"{', '.join(found[:NUM_SHOWN])}."
    )


def build_config(old: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, arguments: Namespace) -> VisualChatConfig:
    """The configuration of NEW; a `ValueError` if the parts are not those of OLD."""
    projection = find_projection(old)
    if "lang_embed.weight" not in old:
        raise ValueError(f"OLD has no lang_embed.weight; it has {', '.join(list(old)[:NUM_SHOWN])}.")
    vision_config = AutoConfig.from_pretrained(arguments.vision)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    if vision_config.model_type not in VISION_PREFIXES:
        raise ValueError(
            f"--vision is a {vision_config.model_type!r} model; OLD can have one of {', '.join(VISION_PREFIXES)}."
        )
    # Some towers have an output of another width than their layers; `hidden_size` is that of the output.
    width, old_width = vision_config.hidden_size, old[projection.width_key].shape[-1]
    if width != old_width:
        raise ValueError(
            f"The features of --vision have a width of {width}, and the projector of OLD reads {old_width} "
            f"({projection.width_key}); name the vision tower that OLD was trained from."
        )
    num_embeddings = len(old["lang_embed.weight"])
    if num_embeddings != len(tokenizer):
        raise ValueError(
            f"lang_embed.weight has {num_embeddings} rows, and the tokenizer of --text {len(tokenizer)} tokens with "
            "those that the original adds; name the language model that OLD was trained from."
        )
    text_config = AutoConfig.from_pretrained(arguments.text)
    text_config.vocab_size = num_embeddings
    text_config.tie_word_embeddings = False  # only the input embeddings were trained
    mmca = {"merge": "sum", "image_attention": arguments.image_attention, "image_scope": "all"}
    config = VisualChatConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_type=projection.projector_type,
        attention_type=arguments.attention_type,
        **(mmca if arguments.attention_type == "mmca" else {}),
        **projection.fields(old, vision_config),
    )
    dtype = arguments.dtype or str(old["lang_embed.weight"].dtype).removeprefix("torch.")
    for part in (config, config.vision_config, config.text_config):
        part.dtype = dtype
    config.architectures = [VisualChatForConditionalGeneration.__name__]
    return config


@dataclass(frozen=True)
class LoraPair:
    """What LoRA adds to a weight: `(right @ left).T / rank`, of (input width, rank) and (rank, output width)."""

    right: Tensor
    left: Tensor

    def update(self, rows: slice) -> Tensor:
        """Rows of it, in float32."""
        return self.left[:, rows].float().T @ self.right.float().T / len(self.left)

    def merge(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        merged = torch.empty(weight.shape, dtype=dtype)
        for rows in row_blocks(weight):
            merged[rows] = weight[rows].float() + self.update(rows)
        return merged


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows, few enough that a computation on them takes little memory."""
    step = max(1, BLOCK_SIZE // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))


def are_fused(pairs: list[tuple[LoraPair, Tensor, Tensor | None]]) -> bool:
    """
    Whether weights of OLD contain their LoRA updates: whether they differ from those of the part by them.

    The training script adds the updates before it saves, and leaves the pairs in the file. A checkpoint that was put
    together from the state of DeepSpeed has them apart. The weights below the pairs are always frozen.

    Args:
        pairs: Pairs, the weights of OLD, and those of the part.
    """
    known = [(pair, weight, base) for pair, weight, base in pairs if base is not None]
    if pairs and not known:
        raise ValueError(
            "OLD has LoRA pairs, and the parts have no weights to compare with, which would tell whether the weights "
            "of OLD already contain them: pass --lora fused (saved by the training script) or --lora apart."
        )
    unchanged = fused = 0.0  # squared distances
    for pair, weight, base in known:
        for rows in row_blocks(weight):
            change = weight[rows].float() - base[rows].float()
            unchanged += change.square().sum().item()
            fused += (change - pair.update(rows)).square().sum().item()
    return fused < unchanged


def plan(
    old: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], config: VisualChatConfig, arguments: Namespace
) -> tuple[list[PlannedWeight], Report]:
    """
    The weights of NEW, by their shapes, all checked and none read yet; and the report.

    Raises:
        `ValueError`: keys of OLD do not fit, are not known or are missing; the first are named.
    """
    report, faults = Report(), []
    sources: dict[str, list[Tensor]] = {}
    pairs: dict[str, LoraPair] = {}
    to_compare = []
    vision, text = PartWeights(arguments.vision), PartWeights(arguments.text)
    projection = find_projection(old)
    prefixes = {
        "vision_tower": (VISION_PREFIXES[config.vision_config.model_type], vision),
        "language_model": ("lang_decoder.model.", text),
        "lm_head": ("lang_decoder.lm_head.", text),
    }
    for name, shape in shapes.items():
        group, _, rest = name.removeprefix("model.").partition(".")
        if group == "multi_modal_projector":
            keys, base = [f"projection.{key}" for key in projection.names[rest]], None
        elif name == "model.language_model.embed_tokens.weight":
            keys, base = ["lang_embed.weight"], None
        else:
            prefix, part = prefixes[group]
            keys, base = [prefix + rest], partial(part.get, name if group == "lm_head" else rest)
        lacking = [key for key in keys if key not in old]
        if not lacking:
            sources[name] = [old[key] for key in keys]
            report.taken |= dict.fromkeys(keys, name)
        elif base is not None and (weight := base()) is not None:
            sources[name] = [weight]
            report.missing[name] = part.name
        else:
            faults.append(f"{lacking[0]} is missing" + (f", also in {part.name}" if base else ""))
            continue
        found = tuple(sources[name][0].shape)
        if len(keys) > 1:
            found = (sum(len(source) for source in sources[name]), *found[1:])
        if found != shape:
            faults.append(f"{' + '.join(keys)} has shape {found}, expected {shape}")
        pair_keys = [f"{keys[0].removesuffix('weight')}lora_{side}_weight" for side in ("right", "left")]
        right, left = map(old.get, pair_keys)
        if right is None and left is None:
            continue
        report.merged |= {key: name for key in pair_keys if key in old}
        shapes_found = [() if half is None else tuple(half.shape) for half in (right, left)]
        rank = shapes_found[1][:1]
        if shapes_found != [(shape[-1], *rank), (*rank, shape[0])]:
            wanted = f"({shape[-1]}, rank) and (rank, {shape[0]})"
            faults.append(f"{pair_keys[0]} and its left weight have shapes {shapes_found}, expected {wanted}")
            continue
        pairs[name] = LoraPair(right, left)
        if arguments.lora is None and not lacking and found == shape:
            to_compare.append((pairs[name], old[keys[0]], base()))
    for key in [key for key in old if key not in report.taken and key not in report.merged]:
        reason = next((reason for pattern, reason in LEFT_OUT.items() if re.fullmatch(pattern, key)), None)
        if reason is None:
            faults.append(f"{key} of shape {tuple(old[key].shape)} is not known")
        else:
            report.left_out[key] = reason
    if faults:
        more = f"; and {len(faults) - NUM_SHOWN} more" if len(faults) > NUM_SHOWN else ""
        raise ValueError(f"OLD does not fit the parts: {'; '.join(faults[:NUM_SHOWN])}{more}.")
    if arguments.lora == "fused" or are_fused(to_compare):
        report.left_out |= dict.fromkeys(report.merged, FUSED)
        report.merged, pairs = {}, {}

    def make(name: str) -> Tensor:
        if name in pairs:
            return pairs[name].merge(sources[name][0], getattr(torch, config.dtype))
        return sources[name][0] if len(sources[name]) == 1 else torch.cat(sources[name])

    return [PlannedWeight(name, shape, partial(make, name)) for name, shape in shapes.items()], report


def convert(arguments: Namespace) -> Report:
    """Converts, and leaves nothing where it cannot; see `main` for the arguments."""
    if arguments.new.exists():
        raise ValueError(f"{arguments.new} exists; name a folder that does not.")
    old = read_state_dict(arguments.old / "pytorch_model.bin" if arguments.old.is_dir() else arguments.old)
    tokenizer = load_tokenizer(arguments.text)
    config = build_config(old, tokenizer, arguments)
    with torch.device("meta"):
        model = VisualChatForConditionalGeneration(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    weights, report = plan(old, shapes, config, arguments)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
    processor = VisualChatProcessor(
        AutoImageProcessor.from_pretrained(arguments.vision),
        tokenizer,
        config.image_seq_length,
        chat_template=CHAT_TEMPLATE.replace("SYSTEM_INSTRUCTION", json.dumps(arguments.system_instruction.strip())),
    )
    try:
        generation_config = GenerationConfig.from_pretrained(arguments.text)
    except OSError:  # the part has none
        generation_config = model.generation_config

    arguments.new.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.new.parent, prefix=f".{arguments.new.name}-") as temporary:
        folder = Path(temporary) / arguments.new.name
        folder.mkdir()
        custom_object_save(model, folder)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        generation_config.save_pretrained(folder)
        write_weights(folder, weights, getattr(torch, config.dtype), int(arguments.max_shard_gb * 1e9))
        (folder / "conversion_report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        folder.rename(arguments.new)
    return report


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="pytorch_model.bin, or the folder that holds it")
    parser.add_argument("new", type=Path, metavar="NEW", help="folder to write, which must not exist")
    parser.add_argument("--vision", required=True, help="name or folder of the vision tower that OLD was trained from")
    parser.add_argument("--text", required=True, help="name or folder of the language model that OLD was trained from")
    parser.add_argument(
        "--attention_type", default="mmca", choices=["mmca", "causal"], help="causal if OLD was trained without MMCA"
    )
    parser.add_argument(
        "--image_attention",
        default="self_and_text",
        choices=["self_and_text", "self"],
        help="self_and_text, the default: image tokens also attend to earlier text, as in the original",
    )
    parser.add_argument(
        "--lora",
        choices=["fused", "apart"],
        help="whether the weights of OLD contain its LoRA pairs; by default found by comparison with the parts",
    )
    parser.add_argument(
        "--system_instruction",
        default=SYSTEM_INSTRUCTION,
        help="first words of a conversation; the original trained with DEFAULT_PROMPT in its utils/data/DST.py",
    )
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES]
    parser.add_argument("--dtype", choices=dtypes, help="dtype of NEW; by default that of the trained embeddings")
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="maximum size of a file in GB")
    arguments = parser.parse_args()
    try:
        report = convert(arguments)
    except (ValueError, OSError, StrictDataclassError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{report}\n{NOTES}\n{arguments.new}: written")


if __name__ == "__main__":
    main()
