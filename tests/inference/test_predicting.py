"""`predict --adapter FILE --images PATH...`: every image once, in order, however often it was stopped."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from snell_lightning import load_classifier
from snell_lightning.cli import main
from snell_lightning.inference import predicting

from .conftest import IMAGES, save, tuned

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs `predict` and gives what it said; with `fails` the one line of its error."""
    monkeypatch.setattr(predicting, "_PART", 16)

    def predict(*arguments: object, fails: bool = False) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["predict", "--batch_size", "8", *map(str, arguments)])
        said = capsys.readouterr()
        assert bool(ended.value.code) == fails, said.err
        if fails:
            assert said.err.splitlines()[-1].startswith("error: ")
            return said.err.splitlines()[-1]
        return said.err

    return predict


def images(folder: Path) -> list[str]:
    """Paths of all images, sorted."""
    return sorted(map(str, folder.rglob("*.png")))


def read_csv(path: Path) -> list[dict[str, str]]:
    """Its rows."""
    with path.open(newline="", errors="surrogateescape", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def leftovers(folder: Path) -> list[str]:
    """What lies beside the outputs that is no table."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


class TestTables:
    def test_csv_names_the_classes_in_order(self, run: Run, adapter: Path, photos: Path, tmp_path: Path) -> None:
        output = tmp_path / "new" / "found.csv"

        said = run("--adapter", adapter, "--images", photos, "--output", output, "--top_k", 3)

        rows = read_csv(output)
        assert list(rows[0]) == [
            "image", "class", "probability", "class_2", "probability_2", "class_3", "probability_3", "error",
        ]  # fmt: skip
        assert [row["image"] for row in rows] == images(photos)
        expected = load_classifier(adapter, "cpu").predict(images(photos), top_k=3)
        for row, prediction in zip(rows, expected, strict=True):
            assert (row["class"], row["class_2"], row["class_3"]) == prediction.labels
            found = [float(row[f"probability{ending}"]) for ending in ("", "_2", "_3")]
            assert found == pytest.approx(prediction.probabilities, abs=2e-6)
        assert f"({IMAGES} rows, " in said
        assert "images a second)" in said
        assert leftovers(output.parent) == []

    def test_json_lines(self, run: Run, adapter: Path, photos: Path, tmp_path: Path) -> None:
        run("--adapter", adapter, "--images", photos, "--output", tmp_path / "found.jsonl", "--top_k", 20)

        rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
        assert [row["image"] for row in rows] == images(photos)
        assert [len(row["classes"]) for row in rows] == [10] * IMAGES
        assert [sum(row["probabilities"]) for row in rows] == pytest.approx([1] * IMAGES, abs=1e-4)

    def test_parquet(self, run: Run, adapter: Path, photos: Path, tmp_path: Path) -> None:
        from pyarrow import parquet

        run("--adapter", adapter, "--images", photos, "--output", tmp_path / "found.parquet")

        rows = parquet.read_table(tmp_path / "found.parquet").to_pylist()
        assert [row["image"] for row in rows] == images(photos)
        assert [row["classes"][0] for row in rows] == [
            prediction.label for prediction in load_classifier(adapter, "cpu").predict(images(photos))
        ]
        assert {row["error"] for row in rows} == {None}

    @pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
    def test_embeddings(self, run: Run, adapter: Path, photos: Path, tmp_path: Path, ending: str) -> None:
        output = tmp_path / f"features.{ending}"

        run("--adapter", adapter, "--images", photos, "--output", output, "--embeddings")

        if ending == "csv":
            rows = [[float(row[f"feature_{number}"]) for number in range(1, 145)] for row in read_csv(output)]
        elif ending == "jsonl":
            rows = [json.loads(line)["embedding"] for line in output.read_text().splitlines()]
        else:
            from pyarrow import parquet

            rows = parquet.read_table(output)["embedding"].to_pylist()
        expected = load_classifier(adapter, "cpu").embed(images(photos))
        torch.testing.assert_close(torch.tensor(rows), expected, rtol=1e-4, atol=1e-4)

    def test_several_adapters_of_one_backbone(self, run: Run, adapter: Path, photos: Path, tmp_path: Path) -> None:
        other = save(tmp_path / "other.safetensors", tuned(photos, seed=1), photos)

        run("--adapter", adapter, "--adapter", other, "--images", photos, "--output", tmp_path / "both.csv")

        rows = read_csv(tmp_path / "both.csv")
        assert [(row["adapter"], row["image"]) for row in rows] == [
            (str(file), image) for file in (adapter, other) for image in images(photos)
        ]
        for file in (adapter, other):
            expected = [found.label for found in load_classifier(file, "cpu").predict(images(photos))]
            assert [row["class"] for row in rows if row["adapter"] == str(file)] == expected


class TestGoingOn:
    @pytest.mark.parametrize("ending", ["csv", "parquet"])
    def test_stopped_anywhere_it_ends_in_the_same_file(
        self, run: Run, adapter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
    ) -> None:
        whole, output = tmp_path / f"whole.{ending}", tmp_path / f"found.{ending}"
        run("--adapter", adapter, "--images", photos, "--output", whole)
        arguments = ("predict", "--batch_size", "8", "--adapter", adapter, "--images", photos, "--output", output)
        stops = 0
        for module, name in ((os, "replace"), (shutil, "rmtree")):
            # Every step that leaves something behind: it is done, and then there is no time for anything more.
            while _stop_after(monkeypatch, module, name, stops if name == "replace" else stops - 6, arguments):
                stops += 1
                run(*arguments[3:])
                assert output.read_bytes() == whole.read_bytes()
                assert leftovers(tmp_path) == []
                output.unlink()
            output.unlink()

        # The plan, three parts, the table, what it was made with; the folder before and after.
        assert stops == 6 + 2

    def test_new_images_are_added_and_nothing_is_done_twice(
        self, run: Run, adapter: Path, photos: Path, tmp_path: Path
    ) -> None:
        folder, output = tmp_path / "photos", tmp_path / "found.csv"
        shutil.copytree(photos / "digit 4", folder / "4")
        run("--adapter", adapter, "--images", folder, "--output", output)
        before = output.read_bytes()
        said = run("--adapter", adapter, "--images", folder, "--output", output)
        assert f"has all {IMAGES // 10} images already" in said
        assert output.read_bytes() == before
        shutil.copytree(photos / "digit 3", folder / "3")

        said = run("--adapter", adapter, "--images", folder, "--output", output)

        assert f"{IMAGES // 10} rows are in {output} already, {IMAGES // 10} are not" in said
        assert output.read_bytes().startswith(before)
        assert [row["image"] for row in read_csv(output)] == images(folder / "4") + images(folder / "3")

    def test_with_several_adapters_it_goes_on_and_takes_new_images_too(
        self, run: Run, adapter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = save(tmp_path / "other.safetensors", tuned(photos, seed=1), photos)
        folder, output = tmp_path / "photos", tmp_path / "found.csv"
        shutil.copytree(photos / "digit 4", folder / "4")
        arguments = ("--adapter", adapter, "--adapter", other, "--images", folder, "--output", output)
        assert _stop_after(monkeypatch, os, "replace", 1, ("predict", *arguments))
        shutil.copytree(photos / "digit 3", folder / "3")

        run(*arguments)

        assert [(row["adapter"], row["image"]) for row in read_csv(output)] == [
            (str(file), image) for kind in ("4", "3") for file in (adapter, other) for image in images(folder / kind)
        ]

    @pytest.mark.parametrize("devices", ["1", "2"])
    def test_killed_it_goes_on_with_what_is_left(
        self, run: Run, adapter: Path, photos: Path, tmp_path: Path, devices: str
    ) -> None:
        folder, output = tmp_path / "many", tmp_path / "found.csv"
        folder.mkdir()
        for number in range(1100):
            os.link(images(photos)[number % IMAGES], folder / f"{number:04}.png")
        arguments = ["--adapter", adapter, "--images", folder, "--output", output, "--devices", devices]
        command = [sys.executable, "-m", "snell_lightning", "predict", "--batch_size", "8", *map(str, arguments)]
        parts = tmp_path / f".{output.name}.parts"
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
        _wait_for(lambda: len(list(parts.glob("*-*.csv"))) >= 2 or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = sorted(parts.glob("*-*.csv"))
        assert 2 <= len(done) < 5, "it was to be killed in the middle"

        said = run(*arguments)

        assert f"{output} goes on, with " in said
        assert [row["image"] for row in read_csv(output)] == images(folder)
        assert len({row["class"] for row in read_csv(output)}) > 1
        assert leftovers(tmp_path) == []

    def test_what_was_made_otherwise_is_left_alone(
        self, run: Run, adapter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "found.csv"
        run("--adapter", adapter, "--images", photos, "--output", output)
        before = output.read_bytes()
        other = save(tmp_path / "other.safetensors", tuned(photos, seed=1), photos)

        error = run("--adapter", adapter, "--images", photos, "--output", output, "--top_k", 2, fails=True)
        assert f"{output} was made with top_k 5, and now it is 2; name another output, or delete {output}" in error
        error = run("--adapter", other, "--images", photos, "--output", output, fails=True)
        assert "was made with sha256" in error
        (tmp_path / "mine.csv").write_text("a,b\n")
        error = run("--adapter", adapter, "--images", photos, "--output", tmp_path / "mine.csv", fails=True)
        assert "mine.csv.json is not beside it to say how it was made" in error
        assert output.read_bytes() == before
        assert (tmp_path / "mine.csv").read_text() == "a,b\n"


def test_an_output_that_another_process_writes_is_left_to_it(
    run: Run, adapter: Path, photos: Path, tmp_path: Path
) -> None:
    mark = tmp_path / ".found.csv.lock"
    code = f"""
import fcntl, sys
file = open({str(mark)!r}, "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
    arguments = ("--adapter", adapter, "--images", photos, "--output", tmp_path / "found.csv")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()

        assert "another process is writing" in run(*arguments, fails=True)
        assert not (tmp_path / "found.csv").exists()

        other.kill()
    run(*arguments)
    assert len(read_csv(tmp_path / "found.csv")) == IMAGES


def _stop_after(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, at: int, arguments: tuple[object, ...]
) -> bool:
    """Run the command line until a function has been called `at` times; whether it came to that."""
    own = getattr(module, name)
    calls = iter(range(at + 1))

    def stop(*given: object, **named: object) -> object:
        result = own(*given, **named)
        if next(calls, None) == at:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        patched.setattr(module, name, stop)
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
    return ended.value.code == 130


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 50
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


class TestImagesThatCannotBeRead:
    @pytest.fixture
    def damaged(self, photos: Path, tmp_path: Path) -> Path:
        """A folder with two images that cannot be read among good ones."""
        folder = tmp_path / "damaged"
        shutil.copytree(photos / "digit 1", folder)
        (folder / "1b.png").write_bytes(b"no image")
        (folder / "2b.png").write_bytes((folder / "2.png").read_bytes()[:60])
        return folder

    @pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
    def test_they_keep_their_place_with_the_reason(
        self, run: Run, adapter: Path, damaged: Path, tmp_path: Path, ending: str
    ) -> None:
        output = tmp_path / f"found.{ending}"

        said = run("--adapter", adapter, "--images", damaged, "--output", output)

        assert "(6 rows, 2 unreadable, " in said
        if ending == "csv":
            rows = [(row["image"], row["error"], row["class"]) for row in read_csv(output)]
        elif ending == "jsonl":
            lines = [json.loads(line) for line in output.read_text().splitlines()]
            rows = [(row["image"], row.get("error", ""), "".join(row.get("classes", ())[:1])) for row in lines]
        else:
            from pyarrow import parquet

            lines = parquet.read_table(output).to_pylist()
            rows = [(row["image"], row["error"] or "", "".join((row["classes"] or ())[:1])) for row in lines]
        assert [image for image, *_ in rows] == images(damaged)
        assert [bool(error) for _, error, _ in rows] == [False, False, True, False, True, False]
        assert [bool(label) for *_, label in rows] == [True, True, False, True, False, True]
        assert rows[2][1] == "not an image in a format that PIL knows"

    def test_on_demand_they_are_an_error_and_what_was_done_is_kept(
        self, run: Run, adapter: Path, damaged: Path, tmp_path: Path
    ) -> None:
        arguments = ("--adapter", adapter, "--images", damaged, "--output", tmp_path / "found.csv")

        error = run(*arguments, "--on_bad_image", "error", fails=True)

        assert f"cannot read image {damaged / '1b.png'}: not an image" in error
        assert "2 unreadable" in run(*arguments)

    def test_none_that_can_be_read_is_an_error(self, run: Run, adapter: Path, damaged: Path, tmp_path: Path) -> None:
        bad = (damaged / "1b.png", damaged / "2b.png")

        error = run("--adapter", adapter, "--images", *bad, "--output", tmp_path / "found.csv", fails=True)

        assert f"none of the 2 images could be read, such as {bad[0]}: not an image" in error
        assert not (tmp_path / "found.csv").exists()
        assert leftovers(tmp_path) == []

    def test_names_of_any_bytes_and_with_line_breaks(
        self, run: Run, adapter: Path, photos: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "names"
        folder.mkdir()
        expected = []
        for name in (b"a\xff.png", b'b\n,".png', "ü.png".encode()):
            shutil.copy(images(photos)[0], os.fsencode(folder) + b"/" + name)
            expected.append(os.fsdecode(os.fsencode(folder) + b"/" + name))
        for ending in ("csv", "jsonl", "parquet"):
            output = tmp_path / f"found.{ending}"
            run("--adapter", adapter, "--images", folder, "--output", output)
            assert "has all 3 images already" in run("--adapter", adapter, "--images", folder, "--output", output)
        assert sorted(row["image"] for row in read_csv(tmp_path / "found.csv")) == sorted(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "x"), "the following arguments are required: --adapter, --output"),
        (("--adapter", "nothing.safetensors"), "there is no adapter file nothing.safetensors"),
        (("--output", "found.txt"), "--output found.txt ends in .txt; expected .csv, .jsonl, .parquet"),
        (("--top_k", "0"), "--top_k is 0; expected at least 1"),
        (("--devices", "0"), "--devices is 0"),
        (("--num_workers", "-1"), "--num_workers is -1"),
        (("--top-k", "3"), "unrecognized arguments: --top-k 3"),
        (("--precision", "fp8"), "invalid choice: 'fp8'"),
        (("--images", "nowhere"), "no match for --images nowhere"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, adapter: Path, photos: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = {"--adapter": str(adapter), "--images": str(photos), "--output": str(tmp_path / "found.csv")}
    given = {} if "required" in message else given
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))

    error = run(*[text for pair in given.items() for text in pair], fails=True)

    assert message in error
    assert not (tmp_path / "found.csv").exists()
