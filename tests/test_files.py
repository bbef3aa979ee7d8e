"""Files and run folders, function by function: what is written, read back, refused and removed."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sae_separation import files, run_folder
from sae_separation.errors import WrongRequest
from sae_separation.files import CannotWrite, Unusable

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # sha256 of b"abc", FIPS 180-4


def put(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def names(folder: Path) -> set[str]:
    """Files and links below a folder."""
    found = (p for p in folder.rglob("*") if p.is_symlink() or p.is_file())
    return {str(p.relative_to(folder)) for p in found}


# ---- files


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device; free disk space"),
        (SafetensorError("I/O error: File too large (os error 27)"), "File too large; raise the file size"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error; see to it"),
        (SafetensorError("a bug"), "a bug; see to it"),
    ],
)
def test_what_cannot_be_written_is_told_with_cause_and_remedy(error, why):
    with pytest.raises(CannotWrite) as told, files.writing(Path("a/x.json")):
        raise error
    assert str(told.value).startswith(f"a/x.json cannot be written: {why}")
    assert str(told.value).endswith(", then the same command goes on from the last checkpoint")
    with pytest.raises(KeyError), files.writing(Path("a/x.json")):
        raise KeyError("a bug is no fault of the disk")


def test_a_sync_reaches_the_file_and_closes_it(tmp_path, monkeypatch):
    synced, there = [], os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    for path in (put(tmp_path / "x"), tmp_path):
        files.sync(path)
    assert synced == [str(tmp_path / "x"), str(tmp_path)] and len(os.listdir("/proc/self/fd")) == len(there)
    with pytest.raises(FileNotFoundError):
        files.sync(tmp_path / "gone")


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path, elsewhere = tmp_path / "x", put(tmp_path / "elsewhere", "mine")
    (beside := tmp_path / f"x{files.HALF_WRITTEN}").symlink_to(elsewhere)
    files.write_whole(path, b"one")
    assert path.read_bytes() == b"one" and elsewhere.read_text() == "mine"

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m, pytest.raises(CannotWrite, match="free disk space"):
        m.setattr(os, "fsync", no_space)
        files.write_whole(path, b"two")
    assert path.read_bytes() == b"one" and not beside.exists()
    files.write_whole(path, b"two")
    assert path.read_bytes() == b"two" and names(tmp_path) == {"x", "elsewhere"}


def test_json_is_strict_and_ends_with_a_line():
    assert files.as_json({"a": [1, None]}) == b'{\n "a": [\n  1,\n  null\n ]\n}\n'
    assert files.as_json({"a": 1}, indent=None) == b'{"a":1}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.as_json({"a": float("nan")})


def test_a_seal_is_broken_by_any_change():
    sealed = json.loads(json.dumps(files.seal({"a": 1, "b": [2.5]})))
    assert files.is_sealed(sealed)
    for change in ({"a": 2}, {"c": 0}, {"sha256": "0" * 64}):
        assert not files.is_sealed(sealed | change)
    assert not files.is_sealed({"a": 1}), "never sealed"


def test_a_sealed_file_is_read_or_named(tmp_path):
    path = tmp_path / "x.json"
    assert files.read_sealed(path) is None
    files.write_json(path, sealed := files.seal({"a": 1}))
    assert files.read_sealed(path) == sealed
    for content, why in (
        ('{"a": 1', "is damaged: Expecting"),
        ("[" * 100_000, "is damaged: "),
        ('{"a": 1}', "is not as it was written: its checksum is wrong"),
        ("[]", "is not as it was written"),
    ):
        put(path, content)
        with pytest.raises(Unusable, match=f"{path} {why}"):
            files.read_sealed(path)


def test_contents_are_read_of_regular_files_of_a_size_that_a_run_writes(tmp_path, monkeypatch):
    assert files.content_of(put(tmp_path / "x", "abc")) == b"abc"
    with pytest.raises(FileNotFoundError):
        files.content_of(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="not a regular file"):
            files.content_of(place)
    monkeypatch.setattr(files, "LARGEST", 3)
    assert files.content_of(tmp_path / "x") == b"abc"
    with pytest.raises(ValueError, match="larger than"):
        files.content_of(put(tmp_path / "x", "abcd"))


def test_a_checksum_is_of_a_regular_files_bytes(tmp_path):
    assert files.sha256_of(put(tmp_path / "x", "abc")) == ABC
    assert files.sha256_of(tmp_path) is files.sha256_of(tmp_path / "gone") is None


# ---- run folders


def test_where_an_sae_lies_and_when_a_run_is_complete(tmp_path):
    assert run_folder.sae_folder(Path("run_1"), 3) == Path("run_1/sae_seed3")
    assert not run_folder.is_complete(tmp_path)
    put(tmp_path / "final_info.json")
    assert run_folder.is_complete(tmp_path)


def test_what_is_written_in_a_part_is_told_by_its_name_and_alone_removed(tmp_path):
    ours = {"step_00000012.safetensors", f"step_00000012.safetensors{files.HALF_WRITTEN}"}
    for name in (*ours, "step_12.safetensors", "notes.txt", "step_00000012.safetensors.tmp"):
        put(tmp_path / name)
    (tmp_path / "step_00000013.safetensors").mkdir()
    assert {path.name for path in run_folder.written(tmp_path, "checkpoints")} == ours
    assert run_folder.written(tmp_path / "gone", "checkpoints") == []
    run_folder.remove_part(tmp_path, "checkpoints")
    assert names(tmp_path) == {"step_12.safetensors", "notes.txt", "step_00000012.safetensors.tmp"}
    (elsewhere := tmp_path / "elsewhere").mkdir()
    put(elsewhere / "cfg.json")
    (link := tmp_path / "sae_seed0").symlink_to(elsewhere)
    run_folder.remove_part(link, "sae_seed*")
    assert not link.is_symlink() and names(elsewhere) == {"cfg.json"}


def test_of_what_was_half_written_only_that_is_removed(tmp_path):
    whole = {"config.json", "eval/seed0_geometry.json", "checkpoints/step_00000001.safetensors", "mine.tmp"}
    for name in whole:
        put(tmp_path / name)
        if name != "mine.tmp":
            put(tmp_path / f"{name}{files.HALF_WRITTEN}")
    run_folder.remove_half_written(tmp_path)
    assert names(tmp_path) == whole


def test_a_complete_run_is_cleared_unless_an_evaluation_waits_or_it_is_not_complete(tmp_path):
    step = put(tmp_path / "checkpoints/step_00000001.safetensors")
    run_folder.clear_left(tmp_path)
    assert step.exists(), "not complete"
    put(tmp_path / "final_info.json")
    (tmp_path / "evaluating").mkdir()
    run_folder.clear_left(tmp_path)
    assert step.exists(), "an evaluation is to be gone on with"
    (tmp_path / "evaluating").rmdir()
    run_folder.clear_left(tmp_path)
    assert names(tmp_path) == {"final_info.json"} and not step.parent.exists()


def test_a_place_where_no_run_can_be_is_refused_and_nothing_made(tmp_path):
    run_folder.refuse_place(tmp_path)
    run_folder.refuse_place(tmp_path / "not/yet/there")
    put(tmp_path / "file")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for place, why in (
        (tmp_path / "file/run_0", "file is a file; name a folder"),
        (tmp_path / "nowhere", "is a link that leads nowhere"),
        (Path("a\tb"), r"'a\\tb' holds a line break or another control character"),
        (Path("x" * 201), "is longer than 200 bytes"),
    ):
        with pytest.raises(WrongRequest, match=why):
            run_folder.refuse_place(place)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "nowhere"}


def test_one_folder_by_two_names_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run_0")
    run_folder.refuse_same((str(tmp_path / "run_0"), str(tmp_path / "run_1")))
    with pytest.raises(WrongRequest, match="run_0 and .*link are the same folder: name two"):
        run_folder.refuse_same((str(tmp_path / "run_0"), "other", str(tmp_path / "link")))


def test_a_result_is_lost_where_its_checksums_are_there_and_no_checkpoint_is(tmp_path):
    run_folder.refuse_lost_result(tmp_path)
    put(tmp_path / "checksums.json")
    with pytest.raises(WrongRequest, match="complete run whose final_info.json is gone: restore that file"):
        run_folder.refuse_lost_result(tmp_path)
    put(tmp_path / "checkpoints/step_00000001.safetensors")
    run_folder.refuse_lost_result(tmp_path)


def test_saes_are_evaluated_as_they_were_written_or_not_at_all(tmp_path):
    def refused() -> str:
        with pytest.raises(WrongRequest) as wrong:
            run_folder.refuse_without_saes(tmp_path, (0,))
        return str(wrong.value)

    sae = run_folder.sae_folder(tmp_path, 0)
    assert f"{sae / 'cfg.json'} is missing; bring it back" in refused()
    put(sae / "cfg.json", "abc")
    weights = put(sae / "sae_weights.safetensors", "w")
    assert f"{sae} is not as it was written" in refused(), "no record of it"
    sums = run_folder.files_of(sae)
    assert sums == {"cfg.json": ABC, "sae_weights.safetensors": hashlib.sha256(b"w").hexdigest()}
    record = run_folder.record_of(tmp_path, 0)
    record.parent.mkdir()
    files.write_json(record, files.seal({"files": sums}))
    run_folder.refuse_without_saes(tmp_path, (0,))
    put(weights, "v")
    assert "the checksum of a file is wrong" in refused()
    put(record, "{")
    assert f"{record} is damaged" in refused()


def test_of_an_sae_those_files_have_a_checksum_that_are_there(tmp_path):
    put(tmp_path / "cfg.json", "abc")
    put(tmp_path / "notes.txt")
    assert run_folder.files_of(tmp_path) == {"cfg.json": ABC}


def test_an_object_of_a_run_folder_is_read_or_refused(tmp_path):
    path = tmp_path / "config.json"
    files.write_json(path, sealed := files.seal({"config": {"a": 1}}))
    assert run_folder.read_run_json(path, {"config"}) == sealed
    for content, why in (
        ("{", "cannot be read"),
        ('{"config": 1}', "was not written by this program"),
        (json.dumps(sealed | {"config": {"a": 2}}), "is not as it was written: its checksum is wrong"),
    ):
        put(path, content)
        with pytest.raises(WrongRequest, match=f"config.json {why}.*--overwrite"):
            run_folder.read_run_json(path, {"config"})
    files.write_json(tmp_path / "final_info.json", {"training": {}})
    files.write_json(tmp_path / "checksums.json", files.seal({"files": {"final_info.json": ABC}}))
    with pytest.raises(WrongRequest, match="final_info.json is not as it was written"):
        run_folder.read_run_json(tmp_path / "final_info.json", {"training"})
