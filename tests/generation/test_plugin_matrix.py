"""Family x cache x decoding method: each equal to a slow loop, or refused by name."""

import functools
import logging
from fnmatch import fnmatch

import pytest
import torch

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import GradualUnrolling, NoAdapter
from pema.errors import ConfigError, PemaError
from pema.generation.mixture import mix
from pema.generation.plugin import attach
from pema.owner.derivation import derive_head
from tiny import HYBRID_FAMILIES, SILENT_FAMILIES, build_model

FAMILIES = ["llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "bloom", "phi3-longrope", "mamba"]
FAMILIES += [*(family for family in HYBRID_FAMILIES if family not in ("smollm3", "mixtral")), *SILENT_FAMILIES]
WITHOUT_PADDING = ("phi3-longrope", "llama4", "minimax", "minimax-linear", "recurrent-gemma", "mamba", "bamba", "rwkv")
"""In transformers, what these give for a row depends on the padding in front of it."""

CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "none": {"use_cache": False},
    "in-parts": {"prefill_chunk_size": 4},
}
METHODS = {
    "greedy": {},
    "samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam-sample": {"num_beams": 2, "do_sample": True, "top_k": 0},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
    "guided": {"guidance_scale": 1.5},
    "guided-from": {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[9, 40, 77], [11, 12, 13]])},
}
REFUSED = {
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
    "dola": ({"dola_layers": "low"}, "dola generation"),
    "groups": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group beam search"),
    "constrained": ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained beam search"),
    "hub": ({"custom_generate": "some/decoding", "trust_remote_code": True}, "custom_generate='some/decoding'"),
    "paged": ({"cache_implementation": "paged"}, "continuous batching"),
    "healing": ({"token_healing": True}, "token_healing"),
    "guided-lookup": ({"guidance_scale": 2.0, "prompt_lookup_num_tokens": 3}, r"guidance_scale=2.0 with assisted"),
}
INEXACT = (
    "phi3-longrope lookup *",  # candidates reach the length behind which the angles change
    "phi3-longrope assisted *",
    "mamba guided* *",  # a state of convolutions or recurrence with a mask that is longer than the input
    "bamba guided* *",
    "minimax guided* *",
    "recurrent-gemma guided* *",
    "minimax beam* *",  # the state of linear attention stays where it was when beams are reordered
    "minimax-linear beam* *",
    "recurrent-gemma beam* *",
    "jamba * in-parts",  # a part does not begin where the convolutions of that before it ended
    "lfm2 lookup static",  # what was not taken of the candidates stays in the convolutions
    "rwkv * *",
)
"""Where a PLM with a cache by itself gives other text than its own passes over the whole sequence, in transformers."""

BEFORE = ("phi3-longrope * *", "mamba2 guided* *", "recurrent-gemma * *")
"""The same in older versions of transformers; there the PLM by itself must be inexact too."""

STEPS, OVERHEAD, COLUMNS = 5, 3, 14
SCHEDULE = GradualUnrolling(0.95)


class Slow:
    """The method as it is written: a pass over the whole sequence for every step, each row alone, no cache."""

    def __init__(self, family):
        self.family = family
        self.model = build_model(family)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        vocabulary, d = self.model.get_output_embeddings().weight.shape
        self.adapter = Adapter(AdapterConfig(d=d, vocabulary_size=vocabulary, rank=8), seed=1).eval()
        with torch.no_grad():
            self.adapter.B_pd.copy_(torch.randn(d, 8, generator=torch.Generator().manual_seed(1)))
        self.head = derive_head(self.model, "head_input")
        self.representation = functools.cache(self._representation)

    @torch.no_grad()
    def _representation(self, ids):
        with recorded(self.model) as kept:
            self.model(torch.tensor([ids]), use_cache=False)
        return kept[0][:, -1]

    @torch.no_grad()
    def log_p(self, prompt, tokens, length, schedule=SCHEDULE):
        """(T, V) log P at each of the tokens behind the prompt."""
        f = torch.cat([self.representation((*prompt, *tokens[:t])) for t in range(len(tokens))])
        weights = schedule.weights(torch.arange(len(tokens)), torch.tensor(length))
        return mix(self.head.logits(f).float().log_softmax(-1), self.adapter.log_probs(f, self.head), weights)

    def attached(self):
        return attach(self.model, self.adapter, self.head, SCHEDULE, prompt_overhead_tokens=OVERHEAD)


class recorded:  # noqa: N801
    """What goes into the output head, a tensor for each pass."""

    def __init__(self, model):
        self._head = model.get_output_embeddings()

    def __enter__(self):
        kept = []
        self._handle = self._head.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
        return kept

    def __exit__(self, *_):
        self._handle.remove()


@pytest.fixture(scope="module", params=FAMILIES)
def slow(request):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return Slow(request.param)


def prompts(rows, family="llama"):
    ids = torch.randint(3, 320, (rows, COLUMNS), generator=torch.Generator().manual_seed(0))
    ids[0, -3:] = ids[0, 1:4]
    mask = torch.ones_like(ids)
    mask[1:, :2] = int(family in WITHOUT_PADDING)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def compare(slow, out, batch, settings, schedule=SCHEDULE):
    """Every token that came out, and what it was chosen from."""
    each = len(out.sequences) // len(batch["input_ids"])
    beams, scale = settings.get("num_beams", 1) > 1, settings.get("guidance_scale")
    scores = slow.model.compute_transition_scores(out.sequences, out.scores, out.beam_indices) if beams else None
    for row, sequence in enumerate(out.sequences):
        ids, mask = (batch[name][row // each] for name in ("input_ids", "attention_mask"))
        prompt, tokens = ids[mask == 1].tolist(), sequence[COLUMNS:].tolist()
        assert len(tokens) == STEPS
        length = len(prompt) - OVERHEAD
        expected = slow.log_p(prompt, tokens, length, schedule)
        if beams:
            chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(scores[row], chosen, atol=1e-3, rtol=1e-3)
            continue
        if scale is not None:
            negative = settings.get("negative_prompt_ids")
            other = slow.log_p(prompt[-1:] if negative is None else negative[row].tolist(), tokens, length, schedule)
            expected = (other + scale * (expected - other)).log_softmax(-1)
        given = torch.stack([logits[row] for logits in (out.logits if scale is None else out.scores)])
        torch.testing.assert_close(given.softmax(-1), expected.exp(), atol=1e-4, rtol=1e-3)
        if not settings.get("do_sample"):
            assert tokens == expected.argmax(-1).tolist()


def run(slow, batch, settings):
    torch.manual_seed(1)
    if "cache_config" in settings:
        # Older versions take the backend out of it.
        settings = settings | {"cache_config": dict(settings["cache_config"])}
    outputs = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    return slow.model.generate(**batch, **settings, **outputs, max_new_tokens=STEPS)


def attempt(slow, batch, settings):
    """What comes out with the adapter; None where transformers refuses the same without one."""
    with slow.attached():
        try:
            return run(slow, batch, settings)
        except PemaError:
            raise
        except Exception as error:
            refused = error
    with pytest.raises(type(refused)) as alone:
        run(slow, batch, settings)
    if str(alone.value) != str(refused):
        raise refused
    return None


def is_one_of(patterns, *names):
    return any(fnmatch(" ".join(names), pattern) for pattern in patterns)


@pytest.mark.parametrize("method", METHODS)
def test_equal_to_the_slow_loop(slow, method):
    batch = prompts(1 if method in ("lookup", "assisted") else 2, slow.family)
    settings = METHODS[method] | ({"assistant_model": build_model("llama", seed=7)} if method == "assisted" else {})
    done = []
    for name, cache in CACHES.items():
        out = attempt(slow, batch, settings | cache)
        if out is not None:
            done.append(name)
            if name != "none" and is_one_of(INEXACT, slow.family, method, name):
                continue
            try:
                compare(slow, out, batch, settings)
            except AssertionError:
                if not is_one_of(BEFORE, slow.family, method, name):
                    raise
                alone = settings if "guidance_scale" in settings else {}
                with pytest.raises(AssertionError):
                    compare(slow, run(slow, batch, alone | cache), batch, alone, NoAdapter())
    assert done or method in ("lookup", "assisted")


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("lookup", "assisted")])
def test_the_mixture_of_what_the_model_itself_computes(slow, method):
    batch = prompts(2, slow.family)
    lengths = batch["attention_mask"].sum(-1) - OVERHEAD
    for cache in [*CACHES.values(), {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}]:
        settings = METHODS[method] | cache
        with recorded(slow.model) as kept:
            out = attempt(slow, batch, settings)
        if out is None:
            continue
        # The last part of the prompt counts; beside each pass of generate, guidance makes one for the other prompt.
        kept = kept[len(kept) - STEPS * (2 if "guidance_scale" in settings else 1) :]
        kept = kept[::2] if "guidance_scale" in settings else kept
        assert len(kept) == len(out.logits) == STEPS
        for t, (f, logits) in enumerate(zip(kept, out.logits, strict=True)):
            rows = lengths.repeat_interleave(len(logits) // len(lengths))
            weights = SCHEDULE.weights(torch.tensor(t), rows)
            log_p_plm = slow.head.logits(f[:, -1]).float().log_softmax(-1)
            expected = mix(log_p_plm, slow.adapter.log_probs(f[:, -1], slow.head), weights).detach()
            torch.testing.assert_close(logits.softmax(-1), expected.exp(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_runs(slow, name):
    settings, match = REFUSED[name]
    with recorded(slow.model) as kept, slow.attached(), pytest.raises(ConfigError, match=match):
        slow.model.generate(**prompts(1), max_new_tokens=2, **settings)
    assert not kept
