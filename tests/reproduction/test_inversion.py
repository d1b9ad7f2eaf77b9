"""The attack on a memory: what it recovers is checked where it must recover everything, and on the bundled PLM."""

import collections
import itertools

import pytest
import torch
from tests.tiny import EOS

from pema.experiments.data import support_data
from pema.memory.build import build_memory
from pema.owner.local import LocalPLM
from pema.tasks.example import Example
from pema.tasks.registry import get_task
from reproduction.experiments import inversion
from reproduction.lines import read_runs
from reproduction.tables.privacy import INVERSION

TASK = get_task("translation")
EXAMPLES = [Example("the house", "das Haus ist klein"), Example("the dog", "hier ist das Haus"), Example("a", "klein")]


@pytest.fixture(scope="module")
def plm(tiny_plm):
    return tiny_plm()


@pytest.fixture(scope="module")
def stored(plm, tmp_path_factory):
    memory = build_memory(plm, EXAMPLES, TASK, tmp_path_factory.mktemp("inversion") / "memory")
    return inversion.stored_texts(memory)


def test_representations_and_targets_belong_together(plm, stored):
    encoded = TASK.template.encode(plm.tokenizer, EXAMPLES)
    assert stored[1] == [list(one.target) for one in encoded]
    for f, one in zip(stored[0], encoded, strict=True):
        contexts = [[*one.prompt, *one.target[:i]] for i in range(len(one.target))]
        for own, there in zip(inversion.represent(plm, contexts), f, strict=True):
            assert float(inversion.distances(own[None], there)) < 2e-3  # the memory stores half precision


def test_with_the_prompt_and_all_tokens_as_candidates_the_whole_text_comes_back(plm, stored):
    prompts = TASK.template.encode_prompts(plm.tokenizer, EXAMPLES)
    for f, target, prompt in zip(*stored, prompts, strict=True):
        text = inversion.recover(plm, f, prompt.prompt, known=True)
        assert text[:-1] == target[:-1]
        assert len(text) == len(target)
        assert target[-1] == EOS


def test_with_another_prompt_the_nearest_of_the_likeliest_is_taken(plm, stored, monkeypatch):
    monkeypatch.setattr(inversion, "CANDIDATES", 5)
    monkeypatch.setattr(inversion, "SHARPNESS", 1e9)
    one, prompt = stored[0][0], [1, 7, 8]
    text: list[int] = []
    head = plm.head()
    for here, after in itertools.pairwise(one):
        candidates = torch.softmax(head.logits(here[None])[0], -1).topk(5).indices.tolist()
        tried = [inversion.represent(plm, [[*prompt, *text, token]]) for token in candidates]
        away = [float(inversion.distances(f, after)) for f in tried]
        text.append(candidates[away.index(min(away))])
    assert inversion.recover(plm, one, prompt, known=False)[:-1] == text


def test_the_folder_alone_gives_the_likeliest_tokens(plm, stored):
    logits = plm.head().logits(stored[0][0])
    assert inversion.likeliest(plm.head(), stored[0][0]) == logits.argmax(-1).tolist()
    assert inversion.share([[1, 2], [3]], [[1, 5], [3]]) == pytest.approx(2 / 3)


def test_the_committed_figures_say_that_a_memory_is_as_secret_as_its_text():
    (run,) = read_runs(INVERSION).values()
    assert run["head_alone"] < run["prompt_unknown"] < run["prompt_known"]
    assert run["prompt_known"] > 0.9
    assert run["sources_identified"] == run["examples"] < run["sources"]


@pytest.mark.slow
def test_the_attack_on_a_memory_of_the_bundled_plm():
    """Far more comes back than by chance, and nothing that is not in the vectors."""
    plm, data = LocalPLM.load("embedded", dtype="float32"), support_data()
    result = inversion.run(plm, data, 6)
    assert result["sources_identified"] == 6
    assert result["prompt_known"] > 0.9
    assert result["prompt_unknown"] > result["head_alone"] + 0.2
    victims = [Example(each.source, each.target) for each in data.test[:2]]
    encoded = get_task(data.task).template.encode(plm.tokenizer, victims)
    targets = [list(each.target) for each in encoded]
    often = collections.Counter(token for target in targets for token in target).most_common(1)[0][0]
    chance = inversion.share([[often] * len(target) for target in targets], targets)
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(len(target), plm.head().d, generator=random) for target in targets]
    recovered = [inversion.recover(plm, f, each.prompt, known=True) for f, each in zip(made, encoded, strict=True)]
    assert inversion.share(recovered, targets) <= chance < 0.2
