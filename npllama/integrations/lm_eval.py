"""A model for lm-eval, the evaluation harness of EleutherAI (extra [lm-eval]).

    import lm_eval
    from npllama.integrations.lm_eval import NpllamaLM

    lm_eval.simple_evaluate(NpllamaLM("model-dir"), tasks=["arc_easy"])

or `lm_eval --model npllama --model_args model=model-dir` once this module was imported. Every request of a call is
under way at once, in company.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from npllama.errors import UsageError
from npllama.inference import Llama, load

DEFAULT_NEW_TOKENS = 256
"""Tokens of an answer where a task says nothing, as in lm-eval's own models."""

GENERATION = ("temperature", "top_k", "top_p", "min_p")
"""Names that lm-eval's tasks and npllama share."""

IGNORED = ("do_sample", "until", "max_gen_toks", "max_new_tokens")
"""Keys of a task that are read here, not by `generate`."""


@register_model("npllama")
class NpllamaLM(TemplateLM):
    """A model directory, a checkpoint, or a model that is open; options are those of `npllama.load`."""

    def __init__(self, model: str | Llama | None = None, **options: Any) -> None:
        super().__init__()
        options.pop("batch_size", None)  # lm-eval passes these to every model; here all requests run at once
        options.pop("max_batch_size", None)
        options.pop("device", None)
        self.llama = model if isinstance(model, Llama) else load(model, **options)

    @property
    def eot_token_id(self) -> int:
        return self.llama.config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.llama.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Ids of a context."""
        return self.llama.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Text to ids; BOS where the model puts one."""
        return self.llama.tokenizer.encode(string, add_special_tokens, False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log probability, whether greedy) of each continuation; contexts that are too long lose their beginning."""
        pairs = [self._fitting(before, after) for _, before, after in requests]
        return [(score.logprob, score.is_greedy) for score in self.llama.score_many(pairs)]

    def _fitting(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        left = self.max_length + 1 - len(after)  # the last id is predicted, and not read
        if left < 1:
            raise UsageError(
                f"a continuation of {len(after)} tokens does not fit into the context of {self.max_length}."
            )
        return before[-left:], after

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each whole text, in lm-eval's windows."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        pieces = [
            [make_disjoint_window(w) for w in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)]
            for ids in texts
        ]
        scores = iter(self.llama.score_many([pair for text in pieces for pair in text]))
        return [sum(next(scores).logprob for _ in text) for text in pieces]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the texts at which its task ends it."""
        results: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for members in groups.values():
            how = dict(requests[members[0]].args[1])
            options = self._options(how)
            prompts = [
                self.tok_encode(requests[i].args[0])[-(self.max_length - options["max_tokens"]) :] for i in members
            ]
            found: Any = self.llama.generate(prompts, **options)
            for i, result in zip(members, found, strict=True):
                results[i] = result.text
        return results

    def _options(self, how: dict[str, Any]) -> dict[str, Any]:
        """The options of `generate` for a task's generation_kwargs. Raises UsageError for one that is not honoured."""
        if unknown := sorted(how.keys() - {*GENERATION, *IGNORED}):
            raise UsageError(f"generation_kwargs: {unknown[0]} is not supported; {', '.join(GENERATION)} are.")
        until = how.get("until") or []
        length = how.get("max_gen_toks") or how.get("max_new_tokens") or DEFAULT_NEW_TOKENS
        options = {name: how[name] for name in GENERATION if name in how}
        if not how.get("do_sample", bool(options.get("temperature"))):
            options["temperature"] = 0.0
        length = min(int(length), self.max_length - 1)
        return {**options, "max_tokens": length, "stop": [until] if isinstance(until, str) else list(until), "seed": 0}
