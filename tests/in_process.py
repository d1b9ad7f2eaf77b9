"""Stages of comparisons that run in the process of the test, which is quicker than in one of their own."""

from pema.experiments.training_process import TRAINED
from pema.files import read_json, write_json, writing


def train_here(method, job, prepared, output):
    """Train as `pema.experiments.training_process.train_in_process` does, without a peak of memory."""
    with writing(output) as temporary:
        temporary.mkdir()
        report = method.train(job, prepared, temporary)
        write_json(temporary / TRAINED, report.to_dict() | {"train_peak_bytes": 0})
    return read_json(output / TRAINED)


def write_parts(folder):
    """Write files of ten training, two dev and three test examples."""
    for part, numbers in (("train", range(10)), ("dev", range(10, 12)), ("test", range(20, 23))):
        rows = "".join(f"a {i}\tthe {i}\n" for i in numbers)
        (folder / f"{part}.tsv").write_text(rows, encoding="utf-8")
