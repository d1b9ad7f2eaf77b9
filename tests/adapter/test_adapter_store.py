import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from made_memories import describe, make_head
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pema.adapter import store
from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, Fitted, GradualUnrolling, Linear
from pema.errors import AdapterError, StorageError
from pema.files import read_json, sha256, write_json

FORMAT_1 = Path(__file__).parent / "fixtures" / "format-1"
D, V = 6, 11


def make(*, reconstructed=True, **options):
    values = {
        "d": D,
        "vocabulary_size": V,
        "rank": 4,
        "plm": describe(make_head(D, V), name="owner/model"),
        "task": "translation",
        "template": "Übersetze: {source}",
        "contexts": "teacher",
        "training": {"figures": {"held_out_cross_entropy": 1.25, "pairs": 12345}, "signature": {"seed": 7}},
    }
    config = AdapterConfig(**values | options)
    adapter = Adapter(config, torch.tensor([1, 4, 9]) if config.vocabulary == "seen" else None, seed=3)
    adapter.B_pd.data.normal_(generator=torch.Generator().manual_seed(1))
    if reconstructed:
        adapter.B_rct = torch.randn(D, config.rank, generator=torch.Generator().manual_seed(2))
    return adapter


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reconstructed": False},
        {"vocabulary": "seen"},
        {"residual": True, "activation": "gelu", "rank": 20, "reconstructed": False},
        {"plm": None, "training": {}, "task": None},
    ],
)
def test_round_trip(options, tmp_path):
    adapter = make(**options)
    adapter.save_pretrained(tmp_path)
    loaded = Adapter.from_pretrained(str(tmp_path))
    assert loaded.config == adapter.config
    assert loaded.name == tmp_path.name
    assert not loaded.training
    mine, theirs = adapter.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_layout_is_that_of_a_peft_adapter(tmp_path):
    make().save_pretrained(tmp_path)
    config = read_json(tmp_path / "adapter_config.json")
    assert config["peft_type"] == "PEMA"
    assert config["base_model_name_or_path"] == "owner/model"
    assert (config["task_type"], config["inference_mode"], config["r"]) == ("CAUSAL_LM", True, 4)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"A", "B_pd", "B_rct"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_card_tells_the_figures_with_their_signature(tmp_path):
    make().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: pema\nbase_model: ")
    for words in (
        "owner/model",
        "1.2500",
        "12,345",
        '"seed": 7',
        "Übersetze: {source}",
        "h_pd = B_pd A f",
        "r = 4",
        "| constant, value 0.7 |",
    ):
        assert words in text
    make(plm=None, training={}, residual=True, activation="gelu").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "h_pd = f + B_pd gelu(A norm(f))" in text
    assert "base_model" not in text
    assert "Figures" not in text


def test_schedules_go_along(tmp_path):
    make(fitted=Fitted((0.5,)), schedule=Linear(0.3)).save_pretrained(tmp_path / "one")
    values = read_json(tmp_path / "one" / "adapter_config.json")["pema"]
    assert values["schedule"] == {"schedule": "linear", "lambda_max": 0.3}
    assert values["fitted"] == {"schedule": "fitted", "values": [0.5], "span": 2.0}
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "| linear, lambda_max 0.3; one fitted to held-out examples is stored too |" in card
    loaded = Adapter.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert Adapter.from_pretrained(tmp_path / "two").config == make(fitted=Fitted((0.5,)), schedule=Linear(0.3)).config


def test_missing_things_are_named(tmp_path):
    with pytest.raises(AdapterError, match=r"contains no adapter: .*adapter_config.json does not exist"):
        Adapter.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is missing: copy or download it again"):
        Adapter.from_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="is not a folder with an adapter: check the path"):
        Adapter.from_pretrained(tmp_path / "nothing" / "here")


@pytest.mark.parametrize("at", [0, 40, -1])
def test_any_changed_byte_of_the_weights_is_found(at, tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is damaged: its (SHA-256|header|tensors)"):
        Adapter.from_pretrained(tmp_path)
    path.write_bytes(data[:-3])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is damaged"):
        Adapter.from_pretrained(tmp_path)


def change(folder, **values):
    path = folder / "adapter_config.json"
    write_json(path, read_json(path) | values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "LORA"}, "contains an adapter of type 'LORA', not PEMA: load it with peft"),
        ({"format": 3}, "has format 3, this version reads 2 and older: use the version of pema that wrote it"),
        ({"format": True}, "has format True"),
        ({"pema": {"d": D}}, "not contain a readable adapter"),
        ({"pema": {"d": D, "vocabulary_size": V, "rank": 4, "colour": 1}}, "unknown setting 'colour'"),
        ({"pema": {"d": D, "vocabulary_size": V, "rank": 3}}, r"A is \(4, 6\), the config says \(3, 6\)"),
        (
            {"pema": {"d": D, "vocabulary_size": V, "rank": 4, "plm": {"name": "x"}}},
            "not contain a readable adapter",
        ),
        ({"pema": 3}, "not contain a readable adapter"),
        ({"pema": {"d": D, "vocabulary_size": V, "rank": 4, "vocabulary": "seen"}}, "vocabulary='seen' needs tokens"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(values, words, tmp_path):
    make().save_pretrained(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(AdapterError, match=words):
        Adapter.from_pretrained(tmp_path)


def test_a_config_that_is_not_json(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff{")
    with pytest.raises(AdapterError, match="cannot be read as JSON"):
        Adapter.from_pretrained(tmp_path)


def test_weights_that_do_not_belong_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    for wrong in ({**held, "C": torch.zeros(1)}, {"A": held["A"]}):
        save_file(wrong, path)
        change(tmp_path, model_sha256=sha256(path))
        with pytest.raises(AdapterError, match=r"expected the tensors A, B_pd \(B_rct, tokens\), got "):
            Adapter.from_pretrained(tmp_path)
    path.write_bytes(b"not a safetensors file")
    change(tmp_path, model_sha256=sha256(path))
    with pytest.raises(AdapterError, match="is damaged: its header is longer than the file"):
        Adapter.from_pretrained(tmp_path)


class Hub:
    """Stands in for HfApi."""

    uploads: ClassVar[list] = []
    refuses = False

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        if self.refuses:
            raise OSError("401 Unauthorized")
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        from pathlib import Path

        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.uploads.append((repo_id, files, self.token, revision))


def test_push_to_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "uploads", [])
    adapter = make()
    adapter.save_pretrained(tmp_path)
    assert adapter.push_to_hub("me/adapter", token="t", revision="v1") == "https://hub/me/adapter"
    [(repo, files, token, revision)] = Hub.uploads
    assert (repo, token, revision) == ("me/adapter", "t", "v1")
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert adapter.name == tmp_path.name
    monkeypatch.setattr(Hub, "refuses", True)
    with pytest.raises(
        AdapterError, match=r"cannot push to me/adapter: 401 Unauthorized\. Log in with `hf auth login`"
    ):
        adapter.push_to_hub("me/adapter")


def test_from_the_hub(tmp_path, monkeypatch):
    adapter = make()
    adapter.save_pretrained(tmp_path)
    asked = []

    def download(name, **values):
        asked.append((name, values["revision"], values["token"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = Adapter.from_pretrained("me/adapter", revision="v1", token="t")
    assert torch.equal(loaded.A, adapter.A)
    assert asked == [("me/adapter", "v1", "t")]

    def refuse(name, **values):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(AdapterError, match=r"me/adapter is neither a folder nor an adapter on the hub .*: offline"):
        Adapter.from_pretrained("me/adapter")


def test_a_disk_that_refuses_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    adapter = make()
    adapter.save_pretrained(tmp_path)

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        adapter.save_pretrained(tmp_path)
    assert torch.equal(Adapter.from_pretrained(tmp_path).A, adapter.A)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(StorageError, match="No space left on device"):
        adapter.push_to_hub("me/adapter")


def test_the_config_is_plain_json(tmp_path):
    make().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["pema"]["rank"] == 4
    assert issubclass(HfHubHTTPError, Exception)


@pytest.mark.parametrize(
    ("contexts", "schedule"), [("teacher", Constant(0.7)), ("predicted", GradualUnrolling(0.9))], ids=lambda x: str(x)
)
def test_an_adapter_of_format_1_is_read_with_its_schedule_file(contexts, schedule, tmp_path):
    """Written by commit cb765d2, which kept the fitted schedule in `schedule.json`."""
    folder = FORMAT_1 / contexts
    loaded = Adapter.from_pretrained(folder)
    assert loaded.config.contexts == contexts
    assert loaded.config.choose_schedule() == schedule
    stored = read_json(folder / "schedule.json")
    assert loaded.config.choose_schedule("fitted").to_dict() == stored
    loaded.save_pretrained(tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["format"] == 2
    assert not (tmp_path / "schedule.json").exists()
    again = Adapter.from_pretrained(tmp_path)
    assert again.config == loaded.config
    assert all(
        torch.equal(x, y) for x, y in zip(again.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_a_schedule_file_stored_by_a_user_is_the_adapters(tmp_path):
    shutil.copytree(FORMAT_1 / "teacher", tmp_path / "a")
    write_json(tmp_path / "a" / "schedule.json", {"schedule": "linear", "lambda_max": 0.4})
    assert Adapter.from_pretrained(tmp_path / "a").config.choose_schedule() == Linear(0.4)


def test_the_digest_of_weights_in_memory_is_that_of_their_file(tmp_path):
    make(vocabulary="seen").save_pretrained(tmp_path)
    loaded = Adapter.from_pretrained(tmp_path)
    assert store.digest_of(loaded.state_dict()) == sha256(tmp_path / "adapter_model.safetensors")
