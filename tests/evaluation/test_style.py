import json

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pema.cli import main as pema
from pema.errors import ConfigError, DataError, OwnerError
from pema.evaluation.evaluate import evaluate, get_metric
from pema.evaluation.score import score
from pema.evaluation.significance import paired_bootstrap
from pema.evaluation.style import StyleClassifier, load_classifier
from pema.tasks.registry import get_task

TEXTS = ["the house is small", "yo", "the dog is here and the house is small", "", "here"]
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "id2label": {0: "informal", 1: "Formal", 2: "neutral"},
    "label2id": {"informal": 0, "Formal": 1, "neutral": 2},
}


def build(kind=RobertaForSequenceClassification, config=RobertaConfig, seed=0, **changes):
    torch.manual_seed(seed)
    model = kind(config(**SHAPE | {"pad_token_id": 0, "max_position_embeddings": 34} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            # Matrices large enough that texts differ in the end.
            if parameter.dim() > 1:
                parameter.copy_(1.5 * parameter.shape[1] ** -0.5 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer()


@pytest.fixture
def classifier(tokenizer):
    return StyleClassifier(build(), tokenizer)


@pytest.fixture
def folder(tmp_path, tokenizer):
    build().save_pretrained(tmp_path / "formality")
    tokenizer.save_pretrained(tmp_path / "formality")
    return tmp_path / "formality"


def alone(model, tokenizer, text, window=None):
    """P(label | text), one text at a time, without padding."""
    ids = tokenizer(text)["input_ids"][:window]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].softmax(-1).double().numpy()


def test_probabilities_are_those_of_each_text_alone(classifier, tokenizer):
    expected = np.stack([alone(classifier.model, tokenizer, text) for text in TEXTS])
    np.testing.assert_allclose(classifier.probabilities(TEXTS), expected, atol=1e-5)
    assert np.ptp(expected, axis=0).min() > 0.01  # the texts differ, so a mixed-up order would show


def test_batches_contain_texts_of_similar_length_and_each_text_once(classifier, monkeypatch):
    monkeypatch.setattr("pema.evaluation.style.TOKENS", 30)
    shapes = []
    classifier.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    many = [f"{text} {i}" for i in range(4) for text in TEXTS]
    found = classifier.probabilities(many + many)
    assert sum(rows for rows, _ in shapes) == len(many)
    assert [width for _, width in shapes] == sorted(width for _, width in shapes)
    assert all(rows * width <= 30 or rows == 1 for rows, width in shapes)
    assert len(shapes) > 1
    np.testing.assert_array_equal(found[: len(many)], found[len(many) :])
    classifier.probabilities(many)
    assert sum(rows for rows, _ in shapes) == len(many)


@pytest.mark.parametrize(
    ("kind", "config", "window"),
    [(RobertaForSequenceClassification, RobertaConfig, 33), (BertForSequenceClassification, BertConfig, 34)],
)
def test_long_texts_are_truncated_to_the_models_window_with_a_note(tokenizer, capsys, kind, config, window):
    classifier = StyleClassifier(build(kind, config), tokenizer)
    assert classifier.window == window
    found = classifier.probabilities(["a b c d e f g h i j k l m n o p q r s t u v w x y z" * 3, "yo"])
    cut = alone(
        classifier.model, tokenizer, "a b c d e f g h i j k l m n o p q r s t u v w x y z" * 3, window=classifier.window
    )
    np.testing.assert_allclose(found[0], cut, atol=1e-5)
    assert f"1 of 2 texts are truncated to the {window} tokens" in capsys.readouterr().err


def test_known_answers(tokenizer, tmp_path):
    """All weights zero but the bias: P = softmax(bias) for every text."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.classifier.out_proj.bias.copy_(torch.tensor([0.0, 3.0, 1.0]).log1p())
    model.save_pretrained(tmp_path / "known")
    tokenizer.save_pretrained(tmp_path / "known")
    name = str(tmp_path / "known")
    found = evaluate(
        get_task("style"),
        TEXTS,
        TEXTS,
        sources=["x"] * len(TEXTS),
        metrics=[
            f"style_probability:{name}",
            f"style_probability:{name}#NEUTRAL",
            f"style_accuracy:{name}#formal",
            f"style_accuracy:{name}#informal",
            f"style_improvement:{name}",
        ],
    )
    # log1p(0, 3, 1) = log(1, 4, 2): the softmax is 1/7, 4/7, 2/7.
    assert [each.value for each in found.values()] == pytest.approx([4 / 7, 2 / 7, 1, 0, 0], abs=1e-6)


def test_the_measures_are_means_over_segments(folder, classifier):
    sources = ["yo", "here", "hi", "ok", "well"]
    p, q = classifier.probabilities(TEXTS), classifier.probabilities(sources)
    names = [f"{measure}:{folder}" for measure in ("style_probability", "style_accuracy", "style_improvement")]
    found = evaluate(get_task("style"), TEXTS, TEXTS, sources=sources, metrics=names)
    assert [found[name].value for name in names] == pytest.approx(
        [p[:, 1].mean(), (p.argmax(1) == 1).mean(), (p[:, 1] - q[:, 1]).mean()], abs=1e-6
    )
    assert found[names[0]].signature == (
        f"style_probability|model:formality@{classifier.fingerprint[:12]}|label:Formal|window:33|n:5"
    )


def test_the_bootstrap_compares_systems_by_it(folder):
    metric = get_metric(f"style_improvement:{folder}", sources=TEXTS)
    system = ["the house is small and here" for _ in TEXTS]
    found = paired_bootstrap(metric, TEXTS, system, TEXTS, samples=200)
    assert found.baseline.value == pytest.approx(0, abs=1e-12)
    assert found.difference == pytest.approx(score(metric, system, TEXTS).value)
    assert found.low < found.difference < found.high
    same = paired_bootstrap(metric, system, system, TEXTS, samples=20)
    assert (same.difference, same.p_value) == (0, 1)


def test_evaluate_asks_the_classifier(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("the house\nyo\n", encoding="utf-8")
    (tmp_path / "ref").write_text("a\nb\n", encoding="utf-8")
    files = ("--hypotheses", tmp_path / "out", "--references", tmp_path / "ref", "--sources", tmp_path / "out")
    metrics = (f"style_improvement:{folder}", f"style_probability:{folder}#neutral")
    asked = ("--metric", metrics[0], "--metric", metrics[1], "--json")
    monkeypatch.setattr("sys.argv", ["pema", "evaluate", "--task", "style", *map(str, (*files, *asked))])
    with pytest.raises(SystemExit) as stop:
        pema()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(metrics)
    assert found[metrics[0]]["value"] == 0
    expected = load_classifier(str(folder)).probabilities(["the house", "yo"])[:, 2].mean()
    assert found[metrics[1]]["value"] == pytest.approx(expected)


def test_labels_and_sources_that_are_missing_are_refused(folder, classifier):
    with pytest.raises(ConfigError, match=r"no label 'polite'; it has informal, Formal, neutral\. .*#neutral"):
        get_metric(f"style_accuracy:{folder}#polite")
    with pytest.raises(ConfigError, match="style_improvement compares the hypotheses with their sources"):
        get_metric(f"style_improvement:{folder}")
    with pytest.raises(ConfigError, match="'style_accuracy' names no classifier: write style_accuracy:MODEL"):
        get_metric("style_accuracy")
    with pytest.raises(DataError, match="not aligned: 2 hypotheses, 1 sources"):
        get_metric(f"style_improvement:{folder}", sources=["a"]).statistics(["a", "b"], ["a", "b"])


def test_models_that_do_not_classify_into_styles_are_refused(tokenizer):
    one = {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    with pytest.raises(ConfigError, match=r"not a classifier with several mutually exclusive labels \(it has 1"):
        StyleClassifier(build(**one), tokenizer)
    with pytest.raises(ConfigError, match="problem_type='multi_label_classification'"):
        StyleClassifier(build(problem_type="multi_label_classification"), tokenizer)
    tokenizer.pad_token = None
    shape = {"vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
    with pytest.raises(ConfigError, match=r"has no padding token \(pad_token\): set one"):
        StyleClassifier(GPT2ForSequenceClassification(GPT2Config(**shape)), tokenizer)


def test_checkpoints_that_do_not_load_are_refused(tmp_path, tokenizer):
    load_classifier.cache_clear()
    with pytest.raises(OwnerError, match=r"the folder .*nowhere does not exist"):
        load_classifier(str(tmp_path / "nowhere"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(OwnerError, match="broken cannot be loaded as a text classifier: "):
        load_classifier(str(tmp_path / "broken"))
    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(OwnerError, match=r"headless lacks 2 of the weights of BertForSequenceClassification \(class"):
        load_classifier(str(tmp_path / "headless"))


def test_the_characters_of_a_special_token_are_text(classifier, tokenizer):
    classifier.probabilities(["the </s> house"])
    (found,) = classifier._known.values()
    parts = tokenizer(["the ", "</", "s>", " house"], add_special_tokens=False)["input_ids"]
    ids = [tokenizer.bos_token_id, *(token for part in parts for token in part)]
    with torch.no_grad():
        logits = classifier.model(torch.tensor([ids])).logits
    assert tokenizer.eos_token_id not in ids
    np.testing.assert_allclose(found, logits[0].softmax(-1), rtol=1e-5)


def test_labels_that_differ_by_case_are_distinguished(tokenizer):
    labels = {0: "formal", 1: "Formal", 2: "neutral"}
    classifier = StyleClassifier(build(id2label=labels, label2id={name: i for i, name in labels.items()}), tokenizer)
    assert [classifier.label_index(name) for name in ("formal", "Formal", "NEUTRAL")] == [0, 1, 2]
    with pytest.raises(ConfigError, match="has no label 'FORMAL'; it has formal, Formal, neutral"):
        classifier.label_index("FORMAL")
