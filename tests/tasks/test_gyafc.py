import pytest

from pema.errors import ConfigError, DataError
from pema.tasks.gyafc import DOMAINS, read_gyafc

LINES = 3


@pytest.fixture
def corpus(tmp_path):
    """The corpus's folders with made sentences; `formal` of tune and test is of the other direction, as in GYAFC."""
    for domain in DOMAINS:
        for part in ("train", "tune", "test"):
            folder = tmp_path / "GYAFC_Corpus" / domain / part
            folder.mkdir(parents=True)
            names = ["informal", "formal"]
            if part != "train":
                names += [f"{style}.ref{i}" for style in ("informal", "formal") for i in range(4)]
            for name in names:
                # The other direction has other sentences, and another number of them.
                n = LINES + 2 if part != "train" and name in ("formal", "informal.ref0") else LINES
                (folder / name).write_text("".join(f"{domain} {part} {name} {i}\n" for i in range(n)), encoding="utf-8")
    return tmp_path / "GYAFC_Corpus"


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_train_part_pairs_informal_with_formal(corpus, domain):
    found = read_gyafc(corpus, part="train", domain=domain)
    assert [(e.source, e.target) for e in found] == [
        (f"{domain} train informal {i}", f"{domain} train formal {i}") for i in range(LINES)
    ]
    assert found[1].where.endswith(f"{domain}/train/informal:2")


@pytest.mark.parametrize("part", ["tune", "test"])
@pytest.mark.parametrize("reference", range(4))
def test_tune_and_test_pair_informal_with_a_rewrite_of_it(corpus, part, reference):
    found = read_gyafc(corpus, part=part, domain=DOMAINS[1], reference=reference)
    assert [(e.source, e.target) for e in found] == [
        (f"{DOMAINS[1]} {part} informal {i}", f"{DOMAINS[1]} {part} formal.ref{reference} {i}") for i in range(LINES)
    ]


def test_without_a_domain_both_are_read_and_the_limit_is_of_each(corpus):
    both = [e for domain in DOMAINS for e in read_gyafc(corpus, part="test", domain=domain)]
    assert read_gyafc(corpus, part="test") == both
    first = read_gyafc(str(corpus), part="train", limit=2)
    assert [e.source.split()[0] for e in first] == [DOMAINS[0], DOMAINS[0], DOMAINS[1], DOMAINS[1]]


def test_a_missing_corpus_error_says_how_to_request_it(corpus, tmp_path):
    with pytest.raises(DataError, match=r"elsewhere/Entertainment_Music/train/informal does not exist.*Write to gyafc"):
        read_gyafc(tmp_path / "elsewhere", part="train")
    (corpus / DOMAINS[0] / "test" / "formal.ref2").unlink()
    with pytest.raises(DataError, match=r"formal\.ref2 does not exist.*L6"):
        read_gyafc(corpus, part="test", domain=DOMAINS[0], reference=2)


def test_what_gyafc_does_not_have_is_refused(corpus):
    with pytest.raises(ConfigError, match="unknown GYAFC domain 'Sports': use Entertainment_Music or"):
        read_gyafc(corpus, part="test", domain="Sports")
    with pytest.raises(ConfigError, match="unknown GYAFC part 'dev': use train, tune or test"):
        read_gyafc(corpus, part="dev")
    with pytest.raises(ConfigError, match="reference 4 does not exist in GYAFC's test part: give 0 to 3"):
        read_gyafc(corpus, part="test", reference=4)
    with pytest.raises(ConfigError, match="reference 1 does not exist in GYAFC's train part: give 0 to 0"):
        read_gyafc(corpus, part="train", reference=1)


def test_a_misaligned_file_is_refused(corpus):
    path = corpus / DOMAINS[0] / "train" / "formal"
    path.write_text("only one\n", encoding="utf-8")
    with pytest.raises(DataError, match="not aligned: 3 and 1 lines"):
        read_gyafc(corpus, part="train")
