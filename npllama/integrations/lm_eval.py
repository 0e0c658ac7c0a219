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

from npllama.inference import Llama, load
from npllama.integrations.harness import continuations, log_likelihoods


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
        return log_likelihoods(self.llama, [(before, after) for _, before, after in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each whole text, in lm-eval's windows."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        pieces = [
            [make_disjoint_window(w) for w in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)]
            for ids in texts
        ]
        scores = iter(log_likelihoods(self.llama, [pair for text in pieces for pair in text]))
        return [sum(next(scores)[0] for _ in text) for text in pieces]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the texts at which its task ends it."""
        return continuations(self.llama, [request.args for request in requests])
