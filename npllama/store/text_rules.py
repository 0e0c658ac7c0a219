"""What the small files beside a Hugging Face checkpoint say about text: BOS and EOS, and how its makers sample.

    tokenizer_config.json      add_bos_token, add_eos_token; other options of the tokenizer
    special_tokens_map.json    bos_token, eos_token
    added_tokens.json          tokens that the tokenizer may not have
    generation_config.json     do_sample, temperature, top_k, top_p, min_p, repetition_penalty
    chat_template.jinja        the chat format, by its text; or tokenizer_config.json's chat_template, or GGUF's

What would change results and is not done here is said in a remark, never dropped in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from npllama.checkpoints import read_json
from npllama.checkpoints.configs.hugging_face import GENERATION_CONFIG
from npllama.checkpoints.files import read_whole
from npllama.errors import CheckpointError, UsageError, quote
from npllama.options import OFF, SamplingOptions
from npllama.store.tokenizers import FoundTokenizer
from npllama.system import strict_json
from npllama.text.chat.formats import FORMATS
from npllama.text.chat.recognition import recognised

TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
MAX_BYTES = 16 << 20
MAX_DIGITS = 400
"""model_max_length is written as a whole number of 31 digits where there is no limit."""
MAX_NAMED = 6


class TextRules(NamedTuple):
    """add_bos_token, add_eos_token: what a text gets by itself; sampling, chat_format: None where nothing says them."""

    add_bos_token: bool
    add_eos_token: bool
    sampling: SamplingOptions | None
    chat_format: str | None
    remarks: tuple[str, ...]


def beside(folder: Path, tokenizer: Path) -> Path:
    """The folder whose small files are about a tokenizer: the checkpoint's, if it has any, else the tokenizer's."""
    return folder if os.path.exists(folder / TOKENIZER_CONFIG) else tokenizer.parent


def text_rules(folder: Path, found: FoundTokenizer) -> TextRules:
    """Read the files of a checkpoint's folder; of those for the tokenizer, what it lacks may lie beside the tokenizer.

    Raises CheckpointError for a file that is no JSON object, or a flag that is neither true nor false.
    """
    remarks: list[str] = []
    names = (TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS)
    said, special, added = (_about_tokenizer(folder, found, name) for name in names)
    add_bos, add_eos, about = _around(said, found)
    remarks += about
    remarks += _other_control_ids(said, special, found, add_bos, add_eos)
    remarks += _added_tokens(said, special, added, found)
    done = TOKENIZER_DONE if found.rules is None else TOKENIZER_DONE | SAID_BY_ITSELF
    remarks += _unused(TOKENIZER_CONFIG, said, done, TOKENIZER_OFF)
    generation = read_settings(folder / GENERATION_CONFIG)
    sampling = suggested_sampling(generation or {}, remarks.append)
    remarks += _unused(GENERATION_CONFIG, generation, GENERATION_DONE, GENERATION_OFF)
    chat_format = _chat_format(_chat_template(folder, said, found), found, remarks.append)
    return TextRules(add_bos, add_eos, sampling, chat_format, tuple(remarks))


def _about_tokenizer(folder: Path, found: FoundTokenizer, name: str) -> dict[str, object] | None:
    """One of the small files about a tokenizer: the checkpoint's own, else the one beside the tokenizer."""
    if found.settings is None:
        return None
    return read_settings((folder if os.path.lexists(folder / name) else found.settings) / name)


def read_settings(path: Path) -> dict[str, object] | None:
    """A file that may be absent: then None."""
    if not os.path.lexists(path):
        return None
    digits = MAX_DIGITS if path.name == TOKENIZER_CONFIG else strict_json.MAX_DIGITS
    return read_json(path, MAX_BYTES, digits)


def _around(said: Mapping[str, object] | None, found: FoundTokenizer) -> tuple[bool, bool, list[str]]:
    """Whether a text gets BOS and EOS, and what is to be said of it."""
    asked = _flag(said, "add_bos_token", None), _flag(said, "add_eos_token", None)
    remarks = []
    if found.rules is None:
        add_bos, add_eos = asked[0] is not False, asked[1] is True
        if not add_bos:
            remarks.append(
                f"{TOKENIZER_CONFIG}: add_bos_token is false: a text gets no BOS unless --bos (bos=True) asks"
            )
        if add_eos:
            remarks.append(
                f"{TOKENIZER_CONFIG}: add_eos_token is true: a text gets EOS behind it unless --no-eos (eos=False)"
            )
        return add_bos, add_eos, remarks
    own = bool(found.rules.prefix), bool(found.rules.suffix)
    for what, option, is_asked, is_so in zip(("BOS", "EOS"), ("bos", "eos"), asked, own, strict=True):
        if is_asked not in (None, is_so):
            remarks.append(
                f"{TOKENIZER_CONFIG}: add_{option}_token is {str(is_asked).lower()}, but {found.name} counts, by which "
                f"a text gets {what if is_so else f'no {what}'} (--{'no-' if is_so else ''}{option} asks otherwise)"
            )
    return *own, remarks


def _flag(said: Mapping[str, object] | None, key: str, default: bool | None) -> bool | None:
    value = (said or {}).get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{TOKENIZER_CONFIG}: {key} is {quote(value)}, but true or false is needed; correct it")
    return default if value is None else value


# ---------------------------------------------------------------- chat


def _chat_template(folder: Path, said: Mapping[str, object] | None, found: FoundTokenizer) -> object:
    """The chat template of a checkpoint, whichever file has it; None where there is none."""
    if found.settings is None:
        return found.chat_template
    paths = (folder / CHAT_TEMPLATE, found.settings / CHAT_TEMPLATE)
    file = next((path for path in paths if os.path.lexists(path)), None)
    if file is not None:
        return read_whole(file, MAX_BYTES).decode("utf-8", "replace")
    template = (said or {}).get("chat_template")
    if isinstance(template, list):  # several by their names
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        return named.get("default", template)
    return template


def _chat_format(template: object, found: FoundTokenizer, remark: Callable[[str], None]) -> str | None:
    """The chat format that a template writes, None where there is none or nobody knows it, which is said."""
    if template in (None, ""):
        return None
    chat_format = recognised(template, found.tokenizer) if isinstance(template, str) else None
    if chat_format is None:
        known = ", ".join(FORMATS)
        remark(f"the chat template is of no format that is known; name the one it is with chat_format=: {known}")
    else:
        remark(f"chat format: {chat_format}, by the chat template")
    return chat_format


# ---------------------------------------------------------------- tokens


def _content(token: object) -> str | None:
    """The text of a token, which is written as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _other_control_ids(
    said: Mapping[str, object] | None,
    special: Mapping[str, object] | None,
    found: FoundTokenizer,
    add_bos: bool,
    add_eos: bool,
) -> Iterator[str]:
    """Remarks where another token than the tokenizer's is to begin or end a text."""
    tokenizer = found.tokenizer
    for key, used, token in (("bos_token", add_bos, tokenizer.bos_id), ("eos_token", add_eos, tokenizer.eos_id)):
        for file, values in ((TOKENIZER_CONFIG, said), (SPECIAL_TOKENS, special)):
            asked = _content((values or {}).get(key))
            if used and asked is not None and token is not None and asked != (own := tokenizer.spelling(token)):
                yield f"{file}: {key} is {quote(asked)}, but a text gets {found.name}'s {quote(own)} (id {token})"
                break


def _more(said: Mapping[str, object] | None) -> list[tuple[str, object]]:
    """Texts of the special tokens that a file lists without ids; what kind each is, is said since transformers 5."""
    found: list[object] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = (said or {}).get(key)
        found += listed if isinstance(listed, list) else listed.values() if isinstance(listed, dict) else []
    return [(text, "?") for text in dict.fromkeys(map(_content, found)) if text]


def _added_tokens(
    said: Mapping[str, object] | None,
    special: Mapping[str, object] | None,
    added: Mapping[str, object] | None,
    found: FoundTokenizer,
) -> Iterator[str]:
    """A remark for the tokens that the tokenizer does not have, by whichever file names them."""
    tokenizer = found.tokenizer
    files: dict[str, list[tuple[str, object]]] = {}
    listed = (said or {}).get("added_tokens_decoder")
    entries = [(_content(token), number) for number, token in listed.items()] if isinstance(listed, dict) else []
    files[TOKENIZER_CONFIG] = [(text, number) for text, number in entries if text is not None] or _more(said)
    files[ADDED_TOKENS] = list((added or {}).items())
    files[SPECIAL_TOKENS] = _more(special)
    known = {tokenizer.spelling(i) for i in range(tokenizer.n_pieces)} if any(files.values()) else set()
    for file, tokens in files.items():
        other = [(text, number) for text, number in tokens if text not in known]
        if other:
            first = f"first {quote(other[0][0])} (id {_value(other[0][1])})"
            yield (
                f"{file}: tokens that {found.name} does not have: {len(other)}, {first}; "
                "a text never becomes one, and only those that end a text are sampled unless --padding-ids asks"
            )
        elif file == ADDED_TOKENS and added is not None:
            yield f"{file}: not read, as it names nothing that {found.name} does not have"


# ---------------------------------------------------------------- sampling

TRANSFORMERS = SamplingOptions(temperature=1.0, top_k=50, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
"""What transformers does where generation_config.json is silent, do_sample being true."""

SAMPLING_KEYS = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p")},
    "repetition_penalty": "repeat_penalty",
}


def suggested_sampling(said: Mapping[str, object], remark: Callable[[str], None]) -> SamplingOptions | None:
    """The sampling that generation_config.json asks for, as transformers understands it; None where it is silent.

    do_sample false is greedy, whatever else is said. Differs: options of sampling without do_sample are meant as they
    stand, though transformers would be greedy. A value that cannot be used gets a remark, and its default.
    Source: GenerationConfig of transformers.
    """
    chosen = TRANSFORMERS
    for key, name in SAMPLING_KEYS.items():
        try:
            chosen = chosen.changed({name: said.get(key)})
        except UsageError as error:
            remark(
                f"{GENERATION_CONFIG}: {key} is {quote(said[key])}, which is not used: it{str(error).partition(':')[2]}"
            )
    do_sample = said.get("do_sample")
    if not isinstance(do_sample, bool | None):
        remark(f"{GENERATION_CONFIG}: do_sample is {quote(do_sample)}, which is not used: it needs true or false.")
        do_sample = None
    drawn = replace(chosen, repeat_penalty=1.0) != TRANSFORMERS
    if do_sample is None and chosen == TRANSFORMERS:
        return None
    if do_sample is None and drawn:
        remark(f"{GENERATION_CONFIG}: has options of sampling without do_sample; they are taken as they stand")
    if do_sample is False and drawn:
        remark(f"{GENERATION_CONFIG}: do_sample is false, so its other options of sampling do not count")
    if do_sample is False or not (do_sample or drawn):
        chosen = replace(OFF, temperature=0.0, repeat_penalty=chosen.repeat_penalty)
    shown = ", ".join(f"{name} {value:g}" for name, value in chosen.to_json().items())
    remark(f'{GENERATION_CONFIG} suggests {shown}: stored, and used with --sampling model (sampling="model")')
    if chosen.repeat_penalty != 1:
        remark(f"{GENERATION_CONFIG}: repetition_penalty counts over all tokens in transformers, here over the last 64")
    return chosen


# ---------------------------------------------------------------- what is left

GENERATION_DONE = {
    *SAMPLING_KEYS,
    *("do_sample", "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "max_time"),
    *("length_penalty", "early_stopping", "num_return_sequences", "use_cache", "cache_implementation", "cache_config"),
    *("max_cache_len", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
    *("output_hidden_states", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "low_memory", "compile_config", "disable_compile"),
    *("continuous_batching_config", "prefill_chunk_size", "transformers_version", "_from_model_config", "_commit_hash"),
}
"""Keys that are honoured, or change no text: limits of length, and how things are computed or returned."""

GENERATION_OFF = dict.fromkeys(
    ("num_beams", "num_beam_groups", "typical_p", "guidance_scale", "encoder_repetition_penalty"), 1
)
"""Key -> the value that changes nothing; that null, false, 0 and what is empty change nothing holds for all."""

TOKENIZER_DONE = {
    *("add_bos_token", "add_eos_token", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "model_max_length"),
    *("model_specific_special_tokens", "padding_side", "truncation_side", "chat_template", "name_or_path"),
    *("use_default_system_prompt", "special_tokens_map_file", "tokenizer_file", "added_tokens_file", "vocab_file"),
    *("processor_class", "model_input_names", "use_fast", "max_length", "stride", "truncation", "truncation_strategy"),
    *("padding", "pad_to_multiple_of", "pad_token_type_id", "return_token_type_ids", "backend", "is_local"),
    *("local_files_only", "from_slow", "split_special_tokens", "spaces_between_special_tokens", "trust_remote_code"),
    *("prefix_token", "middle_token", "suffix_token", "eot_token", "fill_token", "suffix_first", "unk_id"),
}
"""Keys that are honoured, or do not change the ids of a text: names of files, padding, chat."""

SAID_BY_ITSELF = {"add_prefix_space", "legacy", "tokenizer_class", "errors", "unk_token_id"}
"""Keys that a vocabulary which knows its own rules has no need of."""

TOKENIZER_OFF = {"legacy": True, "add_prefix_space": True, "errors": "replace"}


def _unused(file: str, said: Mapping[str, object] | None, done: set[str], off: Mapping[str, object]) -> Iterator[str]:
    """A remark that names what is set in a file, may change results and is not done here."""
    left = {key: value for key, value in (said or {}).items() if key not in done}
    kind = left.get("tokenizer_class")
    if isinstance(kind, str) and ("Llama" in kind or kind in ("PreTrainedTokenizerFast", "TokenizersBackend")):
        del left["tokenizer_class"]
    keys = [key for key, value in left.items() if value not in (None, False, "", [], {}, off.get(key))]
    keys += [key for key, value in left.items() if off.get(key) is True and value is False]
    if keys:
        named = ", ".join(f"{quote(key)[1:-1]} ({_value(left[key])})" for key in sorted(keys)[:MAX_NAMED])
        more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
        yield f"{file}: not used here, and may change results elsewhere: {named}{more}"


def _value(value: Any) -> str:
    """A value for a remark, short."""
    return quote(value)[1:-1][:24]
