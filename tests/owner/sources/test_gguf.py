"""GGUF files as PLMs: converted once, verified at each start, with the tokenizer of the file."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import pema
from gguf_files import TEMPLATE, build_llama, rounded, write_gguf
from pema.cli import main
from pema.errors import MismatchError, OwnerError, StorageError
from pema.files import sha256
from pema.owner.contract import PLMDescription
from pema.owner.loading import eos_token_ids
from pema.owner.local import LocalPLM
from pema.owner.sources import conversion, gguf
from pema.owner.weights import fingerprint
from pema.tasks.example import Example
from tiny import BOS, EOS, build_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model in several types."""
    folder = tmp_path_factory.mktemp("files")
    return {kind: write_gguf(folder / f"tiny.{kind}.gguf", kind) for kind in ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")}


def test_an_exact_file_is_the_plm_itself(files):
    plm, model = LocalPLM.load(files["F32"]), build_llama()
    assert plm.description.fingerprint == fingerprint(model)
    assert plm.description.name == "tiny.F32"
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(plm.model(tokens).logits, model(tokens).logits, atol=1e-5)
    assert plm.description.weights == "GGUF in float32"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_weights_are_those_of_the_file_widened(files, kind):
    plm, model = LocalPLM.load(files[kind], dtype="auto"), build_llama()
    for name, parameter in plm.model.named_parameters():
        original = model.get_parameter(name).detach().numpy()
        expected = original if original.ndim == 1 else rounded(original, kind)
        assert torch.equal(parameter, torch.from_numpy(expected).bfloat16()), name
    assert plm.description.weights == f"GGUF quantised to {kind}, widened to bfloat16"
    assert PLMDescription.from_dict(plm.description.to_dict()).weights == plm.description.weights


def test_a_file_in_half_precision_keeps_its_type(files):
    plm = LocalPLM.load(files["F16"], dtype="auto")
    assert plm.model.dtype == torch.float16
    assert plm.description.weights == "GGUF in float16"


def test_tied_embeddings_stay_tied(tmp_path):
    plm = LocalPLM.load(write_gguf(tmp_path / "tied.gguf", model=build_llama(tied=True)))
    assert plm.model.lm_head.weight is plm.model.model.embed_tokens.weight


def test_the_fingerprint_tells_quantisations_apart(files):
    plms = {kind: LocalPLM.load(path, dtype="float32").description for kind, path in files.items()}
    assert len({plm.fingerprint for plm in plms.values()}) == len(files)
    assert len({plm.tokenizer_fingerprint for plm in plms.values()}) == 1


def test_a_memory_says_how_the_weights_were_quantised_and_belongs_to_them(files, tmp_path, monkeypatch, capsys):
    examples = [Example("the house", "das Haus"), Example("the dog", "der Hund")]
    plm = pema.PLM.from_pretrained(files["Q8_0"])
    memory = pema.build_memory(plm, examples, pema.get_task("translation"), tmp_path / "memory")
    monkeypatch.setattr("sys.argv", ["pema", "memory", "info", str(tmp_path / "memory"), "--json"])
    with contextlib.suppress(SystemExit):
        main()
    assert json.loads(capsys.readouterr().out)["plm_weights"] == "GGUF quantised to Q8_0, widened to bfloat16"
    other = LocalPLM.load(files["Q4_0"]).description
    with pytest.raises(MismatchError, match=r"the memory belongs to another PLM: it was made with tiny\.Q8_0 "):
        other.require_same(memory.manifest.plm, "the memory")


def test_the_second_start_converts_nothing(files, cache, monkeypatch, capsys):
    first = LocalPLM.load(files["Q8_0"]).description
    assert "converting the GGUF file of tiny.Q8_0, once" in capsys.readouterr().err
    assert [path.name[:32] for path in cache.iterdir()] == [sha256(files["Q8_0"])[:32]]
    monkeypatch.setattr(conversion, "convert", lambda *_: pytest.fail("it was converted again"))
    monkeypatch.setattr(gguf, "find_spec", lambda package: None)  # reading a converted file needs no further package
    second = LocalPLM.load(files["Q8_0"]).description
    assert second == first
    assert second.weights == first.weights
    assert "converting" not in capsys.readouterr().err


def test_the_conversion_depends_on_the_version_of_transformers(files, cache, monkeypatch):
    LocalPLM.load(files["Q8_0"])
    version = gguf.importlib.metadata.version
    monkeypatch.setattr(
        gguf.importlib.metadata, "version", lambda name: "99.0" if name == "transformers" else version(name)
    )
    LocalPLM.load(files["Q8_0"])
    assert len(list(cache.iterdir())) == 2


def damage(folder, how):
    weights = next(folder.glob("*.safetensors"))
    if how == "a changed byte":
        content, state = bytearray(weights.read_bytes()), weights.stat()
        content[-5] ^= 1
        weights.write_bytes(content)
        os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif how == "a truncated file":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "a missing file":
        (folder / "tokenizer.json").unlink()
    elif how == "another file":
        (folder / "adapter_config.json").write_text("{}")
    elif how == "no manifest":
        (folder / gguf.MANIFEST).unlink()
    else:
        manifest = json.loads((folder / gguf.MANIFEST).read_text())
        (folder / gguf.MANIFEST).write_text(json.dumps(manifest | {"weights": "never quantised"}))


@pytest.mark.parametrize(
    "how",
    ["a changed byte", "a truncated file", "a missing file", "another file", "no manifest", "a changed manifest"],
)
def test_a_damaged_copy_is_converted_again(files, cache, capsys, how):
    plm = LocalPLM.load(files["Q8_0"]).description
    (folder,) = cache.iterdir()
    damage(folder, how)
    capsys.readouterr()
    again = LocalPLM.load(files["Q8_0"]).description
    assert (again, again.weights) == (plm, plm.weights)
    assert "is damaged: it is converted again" in capsys.readouterr().err
    assert gguf._verified(folder) == plm.weights


def _killed(path, cache, ready):
    torch.set_num_threads(1)  # a forked process has none of the threads that OpenMP waits for
    os.environ["PEMA_CACHE"] = cache
    settle = conversion.GGUFFile.weights.fget

    def stop(file):
        settle(file)
        ready.set()
        time.sleep(60)

    conversion.GGUFFile.weights = property(stop)
    gguf.converted("tiny", lambda: [path])


def test_a_kill_in_the_middle_leaves_nothing_half(files, cache):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_killed, args=(files["Q8_0"], str(cache.parent), ready))
    process.start()
    assert ready.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not [path for path in cache.iterdir() if path.suffix not in (".partial", ".lock")]
    folder, _, _ = gguf.converted("tiny", lambda: [files["Q8_0"]])
    assert [path.name for path in cache.iterdir()] == [Path(folder).name]


def _convert(path, cache, results):
    torch.set_num_threads(1)
    os.environ["PEMA_CACHE"] = cache
    made = []
    original = conversion.convert
    conversion.convert = lambda *given: (made.append(1), time.sleep(0.2), original(*given))[-1]
    results.put((gguf.converted("tiny", lambda: [path]), len(made)))


def test_two_processes_at_once_convert_once(files, cache):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_convert, args=(files["Q4_1"], str(cache.parent), results)) for _ in range(2)]
    for process in processes:
        process.start()
    (first, made), (second, others) = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join()
    assert first == second
    assert made + others == 1
    assert [path.name for path in cache.iterdir()] == [Path(first[0]).name]


def test_what_the_file_says_of_its_tokenizer(files, tmp_path):
    plm = LocalPLM.load(files["Q8_0"])
    tokenizer, own = plm.tokenizer, build_tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.chat_template == TEMPLATE
    for text in ("the house is small", "Das Haus.\n  12", " ü 😀", "<s>the</s>"):
        assert tokenizer(text).input_ids == own(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == own.decode(own(text).input_ids)
    assert eos_token_ids(plm.model, tokenizer) == (EOS,)


@pytest.mark.parametrize(
    ("metadata", "first", "last"),
    [
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": None}, False, False),
        ({"add_bos_token": None, "tokenizer_pre": "llama-bpe"}, True, False),
        (
            {"add_bos_token": None, "tokenizer_model": "llama", "token_scores": [-float(n) for n in range(320)]},
            True,
            False,
        ),
        ({"add_bos_token": False, "add_eos_token": True}, False, True),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"add_bos_token": True, "bos_token_id": None}, False, False),
    ],
)
def test_begin_and_end_tokens(tmp_path, metadata, first, last):
    tokenizer = LocalPLM.load(write_gguf(tmp_path / "tiny.gguf", **metadata)).tokenizer
    plain = tokenizer("the house", add_special_tokens=False).input_ids
    assert tokenizer("the house").input_ids == [BOS] * first + plain + [EOS] * last
    assert not {BOS, EOS} & set(plain)


def test_every_token_that_ends_a_turn_ends_a_text(tmp_path):
    plm = LocalPLM.load(write_gguf(tmp_path / "tiny.gguf", eos_token_id=7, eot_token_id=9, chat_template=None))
    assert plm.description.eos_token_ids == (7, 9)
    assert plm.tokenizer.eos_token_id == 7
    assert plm.tokenizer.chat_template is None


def test_no_other_file_of_the_folder_is_read(files, tmp_path):
    path = shutil.copy(files["Q8_0"], tmp_path / "model.gguf")
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json"):
        (tmp_path / name).write_text("{broken")
    assert LocalPLM.load(path).description.fingerprint == LocalPLM.load(files["Q8_0"]).description.fingerprint


def cut(path, target, size):
    target.write_bytes(path.read_bytes()[:size])
    return target


@pytest.mark.parametrize("size", [8, 200, 20_000, -64])
def test_a_truncated_file(files, tmp_path, size, cache):
    with pytest.raises(OwnerError, match=r"the GGUF file of cut is damaged or truncated \(.+\): download it again"):
        LocalPLM.load(cut(files["Q8_0"], tmp_path / "cut.gguf", size))
    assert not list(cache.iterdir())


def test_what_is_no_gguf_file(tmp_path):
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(OwnerError, match=r"page\.gguf is not a GGUF file: it does not start with 'GGUF'\. Download"):
        LocalPLM.load(tmp_path / "page.gguf")
    with pytest.raises(OwnerError, match=r"the GGUF file .*pages\.gguf does not exist: check the path \(did you mean"):
        LocalPLM.load(tmp_path / "pages.gguf")


def test_a_folder_with_gguf_files_says_to_name_one(files):
    with pytest.raises(OwnerError, match=r"contains no config\.json .* Give the GGUF file itself: .*tiny\.F16\.gguf"):
        LocalPLM.load(files["F16"].parent)


def test_a_file_that_cannot_be_read(files, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gguf, "sha256", refuse)
    with pytest.raises(OwnerError, match=r"F16\.gguf cannot be read: Permission denied"):
        LocalPLM.load(files["F16"])


def test_a_split_file(files, tmp_path):
    path = shutil.copy(files["Q8_0"], tmp_path / "tiny-00001-of-00003.gguf")
    with pytest.raises(OwnerError, match=r"is one part of a split GGUF file: join the parts with `llama-gguf-split"):
        LocalPLM.load(path)
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "renamed.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(OwnerError, match="the GGUF file of renamed is one of 3 parts: join them with"):
        LocalPLM.load(tmp_path / "renamed.gguf")


def test_an_architecture_that_transformers_does_not_read(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", architecture="jais")
    with pytest.raises(
        OwnerError, match=r"cannot read the GGUF file of tiny, architecture 'jais': .*transformers fold"
    ):
        LocalPLM.load(path)


def test_a_tokenizer_that_transformers_does_not_read(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tokenizer_model="rwkv")
    with pytest.raises(OwnerError, match="cannot read the tokenizer 'rwkv' in the GGUF file of tiny: "):
        LocalPLM.load(path)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", without={"model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(OwnerError, match=r"finds no model\.layers\.1\.mlp\.up_proj\.weight \(1 weights\) in the GGUF"):
        LocalPLM.load(path)


def test_a_special_token_outside_the_vocabulary(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", eos_token_id=100_000)
    with pytest.raises(
        OwnerError, match=r"the eos token 100000 of tiny is not in its vocabulary|cannot read the tokenizer"
    ):
        LocalPLM.load(path)


def test_scaled_rotary_frequencies_are_not_dropped(tmp_path):
    from gguf import RopeScalingType

    path = write_gguf(tmp_path / "tiny.gguf", rope_scaling_type=RopeScalingType.LINEAR)
    with pytest.raises(OwnerError, match="the GGUF file of tiny scales its rotary frequencies, which this version of"):
        LocalPLM.load(path)


def test_weights_that_transformers_skips_are_counted(tmp_path, caplog):
    model = build_llama()
    model.register_parameter("further", torch.nn.Parameter(torch.ones(32)))
    names = {"further": "blk.0.further.weight"}
    import gguf_files

    original = gguf_files.name_in_file
    gguf_files.name_in_file = lambda name: names.get(name) or original(name)
    try:
        path = write_gguf(tmp_path / "tiny.gguf", model=model)
    finally:
        gguf_files.name_in_file = original
    LocalPLM.load(path)
    read = sum(parameter.numel() for parameter in build_llama().parameters())
    assert f"tiny: transformers reads {read} of the {read + 32} weights in the GGUF file" in caplog.text


def test_a_missing_package_says_how_to_install_it(files, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda package: None)
    with pytest.raises(
        OwnerError, match=r"tiny\.Q8_0 is a GGUF file, which needs gguf and accelerate: pip install 'ac"
    ):
        LocalPLM.load(files["Q8_0"])


def test_a_library_that_cannot_be_imported(files, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda package: True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(OwnerError, match=r"the library gguf, which reads tiny\.Q8_0, cannot be imported \(.+\): pip"):
        LocalPLM.load(files["Q8_0"])


def test_parts_are_joined_and_what_they_make_is_checked(files, tmp_path):
    content = files["Q8_0"].read_bytes()
    parts = [tmp_path / "part0", tmp_path / "part1"]
    for part, piece in zip(parts, (content[:5000], content[5000:]), strict=True):
        part.write_bytes(piece)
    expected = sha256(files["Q8_0"])
    folder, name, _ = gguf.converted("joined", lambda: parts, expected)
    assert name == "joined"
    assert LocalPLM.load(folder).description.fingerprint == LocalPLM.load(files["Q8_0"]).description.fingerprint
    assert gguf.converted("joined", lambda: pytest.fail("they were looked for"), expected)[0] == folder
    shutil.rmtree(folder)
    with pytest.raises(
        OwnerError, match=r"joined differs from the tested file: SHA-256 .* expected of .*part1, .*part0"
    ):
        gguf.converted("joined", lambda: parts[::-1], expected)


def test_a_cache_that_cannot_be_written(files, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEMA_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        StorageError, match=r"cannot write the converted GGUF file to .*: Not a directory. Set PEMA_CACHE"
    ):
        LocalPLM.load(files["Q8_0"])


def test_rounding_to_bfloat16_is_small_against_quantisation():
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    for kind in ("Q8_0", "Q4_1"):
        stored = rounded(values, kind)
        widened = torch.from_numpy(stored).bfloat16().float().numpy()
        assert np.abs(widened - stored).max() <= np.abs(stored).max() / 256
        assert np.square(widened - stored).mean() < np.square(stored - values).mean() / (4 if kind == "Q8_0" else 100)
