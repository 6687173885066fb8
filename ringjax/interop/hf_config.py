"""Hugging Face's config.json of the LLaMA family, read whole: what this library does not know, it refuses.

    llama     LLaMA 2 and 3, SmolLM2, LWM-Text
    mistral   with its sliding window
    qwen2     with biases on queries, keys and values
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ringjax.interop.tensors import listed
from ringjax.json_text import brief
from ringjax.models.config import ModelConfig, RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# What a field that is not there means, by Hugging Face's classes.
_DEFAULTS = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "initializer_range": 0.02, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "rope_theta": None, "rope_scaling": None, "rope_parameters": None, "sliding_window": None,
    "use_sliding_window": False, "max_window_layers": None, "layer_types": None, "partial_rotary_factor": 1.0,
    "max_position_embeddings": 2048,
}  # fmt: skip
_DEFAULTS_OF = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {
        "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768,
    },
}  # fmt: skip
# Of what kinds the fields are that are read, where they are not null.
_INTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "sliding_window", "max_window_layers", "bos_token_id",
)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_INTS, (int,)), **dict.fromkeys(("rms_norm_eps", "initializer_range", "rope_theta"), (int, float)),
    **dict.fromkeys(("model_type", "hidden_act"), (str,)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (dict,)),
    "tie_word_embeddings": (bool,), "use_sliding_window": (bool,), "layer_types": (list,), "architectures": (list,),
    "eos_token_id": (int, list),
}  # fmt: skip
_LARGEST = (1 << 31) - 1
_REQUIRED = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
# Fields that say nothing about the logits of a forward pass.
HARMLESS = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "dtype", "eos_token_id", "finetuning_task", "id2label", "is_decoder", "is_llama_config",
    "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers.js_config",
    "transformers_version", "use_cache",
}  # fmt: skip
# How old versions told their generator to write, in every config.json.
HARMLESS |= {
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "top_k", "top_p", "torchscript",
    "typical_p", "use_bfloat16",
}  # fmt: skip
# What they say where they are not null, false or empty, and why that is not read.
EMPTY_ONLY = {
    "quantization_config": "only weights that are not quantised are read",
    "pruned_heads": "only whole models are read",
    "rope_interleaved": "Hugging Face's LLaMA pairs the halves of a head",
    "auto_map": "it has code of its own, which is not run",
    "add_cross_attention": "there is no cross attention",
    "is_encoder_decoder": "there is no encoder",
}
_ROPE_FIELDS = {
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Description:
    """A published model's shape, and what else its config.json says that matters here."""

    config: ModelConfig
    context: int
    """Tokens of the context that it was trained for."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


def read_hf_config(fields: Mapping[str, Any], where: str = "config.json") -> Description:
    """The model that the fields of a config.json describe; in float32 (`dataclasses.replace` changes that).

    Raises ValueError for a field that is missing or wrong, NotImplementedError for one that this library does not have,
    or does not know: it may change what the model computes.
    """
    return _Reader(fields, where).description()


def refuse_unknown(fields: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises NotImplementedError for fields that are not `known` and may change what the model computes."""
    unknown = sorted(set(fields) - set(known) - HARMLESS - set(EMPTY_ONLY))
    if unknown:
        raise NotImplementedError(
            f"{where} has {listed([f'{name[:80]}: {brief(fields[name])}' for name in unknown])}, unknown here; it may"
            " change what the model computes. Take it out if it does not"
        )
    for name, rule in EMPTY_ONLY.items():
        if fields.get(name):
            raise NotImplementedError(f"{where}: {name} {brief(fields[name])} is not supported: {rule}")


def check_kinds(fields: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a field whose value is of another kind than it is read as, or beyond 32 bits."""
    for name, kinds in _KINDS.items():
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{where}: {name} {brief(value)} is not {' or '.join(kind.__name__ for kind in kinds)}")
        if isinstance(value, (int, float)) and not abs(value) <= _LARGEST:
            raise ValueError(f"{where}: {name} {brief(value)} is beyond {_LARGEST}")
    for name, kind in (("eos_token_id", int), ("layer_types", str)):
        value = fields.get(name)
        if isinstance(value, list) and not all(type(x) is kind for x in value):
            raise ValueError(f"{where}: {name} {brief(value)} is not a list of {kind.__name__}")


class _Reader:
    def __init__(self, fields: Mapping[str, Any], where: str):
        if fields.get("model_type") == "llava":
            raise NotImplementedError(
                f"{where}: model_type 'llava' sees pictures too; open it with ringjax.inference.llava_model.LlavaModel"
            )
        missing = [name for name in _REQUIRED if fields.get(name) is None]
        if missing:
            raise ValueError(f"{where} has no {listed(missing)}; is it the config of a language model?")
        check_kinds(fields, where)
        self.where, self.kind = where, fields["model_type"]
        self.fields = {**_DEFAULTS, **_DEFAULTS_OF.get(self.kind, {}), **fields}

    def description(self) -> Description:
        self._check_known()
        theta, scaling = self._rope()
        get = self.fields.__getitem__
        try:
            config = ModelConfig(
                width=get("hidden_size"), ffn_width=get("intermediate_size"), layers=get("num_hidden_layers"),
                heads=get("num_attention_heads"), kv_heads=get("num_key_value_heads"), head_dim=get("head_dim"),
                vocab_size=get("vocab_size"), vision_vocab_size=0, rope_theta=theta, rope_scaling=scaling,
                norm_eps=get("rms_norm_eps"), tie_embeddings=get("tie_word_embeddings"), qkv_bias=self._bias(),
                window=self._window(), init_std=get("initializer_range"), dtype="float32",
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None
        eos = self.fields.get("eos_token_id")
        eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        return Description(config, get("max_position_embeddings"), self.fields.get("bos_token_id"), eos_ids)

    def _check_known(self) -> None:
        if self.kind not in ARCHITECTURES:
            raise self._refused("model_type", f"the families are {', '.join(ARCHITECTURES)}")
        wanted, found = ARCHITECTURES[self.kind], self.fields.get("architectures") or [ARCHITECTURES[self.kind]]
        if found != [wanted]:
            raise self._refused("architectures", f"a {self.kind} model here is a {wanted}")
        refuse_unknown(self.fields, {*_DEFAULTS, *_REQUIRED}, self.where)
        if self.fields["hidden_act"] not in ("silu", "swish"):
            raise self._refused("hidden_act", "the feed-forward is SwiGLU: silu")
        for name in ("mlp_bias", "attention_bias"):
            if self.fields[name]:
                raise self._refused(name, "the only biases are those of queries, keys and values of qwen2")
        if self.fields["partial_rotary_factor"] not in (None, 1, 1.0):
            raise self._refused("partial_rotary_factor", "all of a head is rotated")

    def _bias(self) -> bool:
        return self.kind == "qwen2"

    def _window(self) -> int | None:
        """The sliding window of all layers. Raises NotImplementedError where only some have it."""
        window, layers = self.fields["sliding_window"], self.fields["num_hidden_layers"]
        types = set(self.fields["layer_types"] or ())
        if types - {"full_attention", "sliding_attention"} or len(types) > 1:
            raise self._refused("layer_types", "all layers have full attention, or all the same window")
        if self.kind == "llama":
            if window is not None:
                raise self._refused("sliding_window", "llama has none; mistral does")
            return None
        if self.kind == "qwen2":
            if not self.fields["use_sliding_window"] or types == {"full_attention"}:
                return None
            first = self.fields["max_window_layers"]
            if types != {"sliding_attention"} and first >= layers:
                return None
            if types != {"sliding_attention"} and first > 0:
                raise self._refused("max_window_layers", f"all {layers} layers have the window, or none")
        return None if types == {"full_attention"} else window

    def _rope(self) -> tuple[float, RopeScaling | None]:
        """theta and the scaling, from `rope_theta` and `rope_scaling`, or `rope_parameters` that has both."""
        given = dict(self.fields["rope_parameters"] or self.fields["rope_scaling"] or {})
        named = (given.pop("rope_theta", None), self.fields["rope_theta"], 10000.0)
        theta = next(value for value in named if value is not None)
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < _LARGEST:
            raise ValueError(f"{self.where}: rope_theta {brief(theta)} must be a number from 0 to {_LARGEST}")
        if given.pop("partial_rotary_factor", 1.0) != 1.0:
            raise self._refused("rope_parameters", "all of a head is rotated")
        kind, legacy = given.pop("rope_type", None), given.pop("type", None)
        kind = kind or legacy or "default"
        if kind == "default":
            return float(theta), None
        if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
            raise self._refused("rope_scaling", f"the rules are {', '.join(_ROPE_FIELDS)}, not {str(kind)[:40]}")
        unknown = sorted(set(given) - _ROPE_FIELDS[kind])
        if unknown:
            raise self._refused("rope_scaling", f"{kind} has no {listed(unknown)}")
        context, original = self.fields["max_position_embeddings"], given.pop("original_max_position_embeddings", None)
        if kind == "yarn":
            original = original or context
            if type(original) is not int or type(context) is not int or not 0 < original <= _LARGEST:
                raise ValueError(
                    f"{self.where}: original_max_position_embeddings {brief(original)} is no number of tokens"
                )
            given["factor"] = given.get("factor") or context / original
        if given.get("factor") is None:
            raise ValueError(f"{self.where}: rope_scaling {kind} has no factor")
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return float(theta), RopeScaling(kind, original_max_position=original, **given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.where}: {error}") from None

    def _refused(self, name: str, rule: str) -> NotImplementedError:
        return NotImplementedError(f"{self.where}: {name} {brief(self.fields.get(name))} is not supported: {rule}")


def write_hf_config(config: ModelConfig, context: int, dtype: str, **more: Any) -> dict[str, Any]:
    """The fields of a config.json for this model; `more` are added (token ids).

    Raises NotImplementedError for what no family there has: vision tables, a softcap, sinks.
    """
    if config.vision_vocab_size:
        raise NotImplementedError(
            f"vision_vocab_size {config.vision_vocab_size}: Hugging Face's LLaMA has no vision tables; write an LWM"
            " stream (.msgpack), or text_only"
        )
    if config.softcap is not None:
        raise NotImplementedError(f"softcap {config.softcap}: none of {', '.join(ARCHITECTURES)} has one")
    if config.sinks:
        raise NotImplementedError(f"sinks {config.sinks}: none of {', '.join(ARCHITECTURES)} has them")
    kind = "qwen2" if config.qkv_bias else "mistral" if config.window is not None else "llama"
    fields = {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "hidden_size": config.width,
        "intermediate_size": config.ffn_width, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.key_heads, "vocab_size": config.vocab_size,
        "max_position_embeddings": context, "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "rope_theta": config.rope_theta, "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std, "torch_dtype": dtype, "use_cache": True,
    }  # fmt: skip
    if kind == "qwen2" and config.head_size * config.heads != config.width:
        raise NotImplementedError(f"head_dim {config.head_dim}: qwen2's heads are width / heads wide")
    if kind != "qwen2" and config.head_dim is not None:
        fields["head_dim"] = config.head_dim
    if kind == "mistral":
        fields["sliding_window"] = config.window
    if kind == "qwen2" and config.window is not None:
        fields |= {"use_sliding_window": True, "sliding_window": config.window, "max_window_layers": 0}
    if config.rope_scaling is not None:
        fields["rope_scaling"] = _scaling_fields(config.rope_scaling)
    return fields | more


def _scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
    values = {
        "original_max_position_embeddings" if name == "original_max_position" else name: value
        for name, value in dataclasses.asdict(scaling).items()
    }
    kept = {name: values[name] for name in sorted(_ROPE_FIELDS[scaling.kind]) if values[name] is not None}
    return {"rope_type": scaling.kind, **kept}
