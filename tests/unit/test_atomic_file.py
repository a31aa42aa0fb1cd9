"""A file appears complete or not at all, under the name that was asked for, and nothing else stays."""

import os
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import sd3
from safetensors.torch import load_file, save_file
from stochastic_fp8_pack.kernels import quantize_file, repair_file
from stochastic_fp8_pack.kernels.errors import CheckpointError
from stochastic_fp8_pack.kernels.files import atomic_file
from stochastic_fp8_pack.kernels.files.atomic_file import remove_stale, replacing
from stochastic_fp8_pack.kernels.files.header import TensorInfo
from stochastic_fp8_pack.kernels.files.writer import writing

HIDDEN = ".stochastic_fp8-0123456789abcdef.tmp"
OLD_STYLE = "a.safetensors.tmp-0123456789abcdef"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "a.safetensors"


def write(target, **options):
    """A file with one tensor."""
    with writing(target, {"a": TensorInfo("float32", (4,))}, {}, **options) as writer:
        writer.write("a", torch.ones(4))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    """A disk with and without hard links."""

    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


# The target


def test_an_existing_file_is_replaced_only_when_asked(target):
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="already exists"):
        write(target)
    assert target.read_bytes() == b"mine"
    write(target, overwrite=True)
    assert load_file(target).keys() == {"a"}


def test_a_new_file_appears_alone(target, links):
    write(target)
    assert load_file(target)["a"].tolist() == [1, 1, 1, 1]
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_nlink == 1


def test_a_file_that_appears_meanwhile_is_not_replaced(target, links):
    with pytest.raises(CheckpointError, match="already exists"), writing(target, {}, {}):
        target.write_bytes(b"mine")
    assert contents(target.parent) == {"a.safetensors": b"mine"}


def test_a_file_that_appears_at_the_last_moment_is_not_replaced(target, links, monkeypatch):
    """After the last look at the target, while the data are synced."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: target.write_bytes(b"mine"))
    with pytest.raises(CheckpointError, match=r"^a.safetensors: already exists; choose another name"):
        write(target)
    assert contents(target.parent) == {"a.safetensors": b"mine"}


def test_of_many_jobs_for_one_new_name_one_succeeds(target, links):
    start, results = threading.Barrier(8), []

    def job():
        try:
            with replacing(target, 0, overwrite=False) as file:
                file.write(threading.current_thread().name.encode())
                start.wait(60)
            results.append(threading.current_thread().name.encode())
        except FileExistsError:
            pass

    threads = [threading.Thread(target=job, name=f"job {i}") for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(target.parent) == {"a.safetensors": results[0]}
    assert len(results) == 1


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_target_as_it_was(target, exception):
    target.write_bytes(b"mine")
    with pytest.raises(exception), writing(target, {}, {}, overwrite=True):
        raise exception
    assert contents(target.parent) == {"a.safetensors": b"mine"}


def test_too_little_disk_space_is_found_before_writing(target, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="80 B are needed, 10 B are free: free 70 B on this disk first"):
        write(target)
    assert list(target.parent.iterdir()) == []


def test_a_new_file_has_the_usual_permissions(target):
    write(target)
    (target.parent / "b").touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((target.parent / "b").stat().st_mode)


@pytest.mark.posix
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_replaced_file_keeps_its_mode(target, mode):
    target.touch()
    target.chmod(mode)
    write(target, overwrite=True)
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert load_file(target).keys() == {"a"}


@pytest.mark.posix
def test_a_folder_that_cannot_be_synced_is_not_an_error(target, monkeypatch):
    sync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write(target)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.posix
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_regular_file_is_not_replaced(target, overwrite):
    os.mkfifo(target)
    with pytest.raises(CheckpointError, match="a.safetensors: is not a regular file"):
        write(target, overwrite=overwrite)
    assert stat.S_ISFIFO(target.stat().st_mode)
    device = target.with_name("device.safetensors")
    device.symlink_to("/dev/null")
    with pytest.raises(CheckpointError, match="device.safetensors: is not a regular file"):
        write(device, overwrite=overwrite)
    assert set(target.parent.iterdir()) == {target, device}


@pytest.mark.posix
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("to", ["nowhere.safetensors", "a.safetensors"])
def test_a_dangling_link_is_not_replaced(target, to, overwrite):
    target.symlink_to(to)
    with pytest.raises(CheckpointError, match="a.safetensors: is a link to a file that does not exist"):
        write(target, overwrite=overwrite)
    assert list(target.parent.iterdir()) == [target]
    assert os.readlink(target) == to


@pytest.mark.posix
def test_the_file_behind_a_link_is_replaced_and_the_link_stays(target, tmp_path):
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "b.safetensors"
    real.write_bytes(b"mine")
    real.chmod(0o640)
    target.symlink_to("disk/b.safetensors")
    with pytest.raises(CheckpointError, match="already exists"):
        write(target)
    write(target, overwrite=True)
    assert target.is_symlink()
    assert load_file(real).keys() == {"a"}
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert set(tmp_path.rglob("*")) == {target, real, real.parent}


# The source


def rewrite(path, change):
    """Change one byte of a file in place."""
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(change)


@pytest.mark.parametrize("nonfinite", ["error", "keep"])
def test_a_source_that_is_rewritten_while_it_is_read_gives_no_file(target, nonfinite):
    source = target.with_name("source.safetensors")
    save_file(sd3(), source)
    calls = []

    def progress(done, total, key):
        calls.append(key)
        if len(calls) == 3:
            rewrite(source, b"\0")

    with pytest.raises(CheckpointError, match=r"^source.safetensors: changed while it was read; try again"):
        quantize_file(source, target, nonfinite=nonfinite, progress=progress)
    assert list(target.parent.iterdir()) == [source]


def test_a_source_that_is_replaced_while_it_is_read_stays_as_it_was_opened(target):
    source, other = target.with_name("source.safetensors"), target.with_name("other.safetensors")
    save_file(sd3(), source)
    quantize_file(source, other)

    def progress(done, total, key):
        if not done:
            write(source, overwrite=True)

    if sys.platform != "win32":  # where an open file cannot be replaced
        quantize_file(source, target, progress=progress)
        assert target.read_bytes() == other.read_bytes()


def test_a_repaired_file_that_is_rewritten_gives_no_file(target, monkeypatch):
    source, scaled = target.with_name("source.safetensors"), target.with_name("scaled.safetensors")
    save_file(sd3(), source)
    quantize_file(source, scaled)
    module = "stochastic_fp8_pack.kernels.state_dict.write"
    written = __import__(module, fromlist=["inspect_source"]).inspect_source

    def inspect(opened):
        rewrite(scaled, b"\0")
        return written(opened)

    monkeypatch.setattr(f"{module}.inspect_source", inspect)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        repair_file(scaled, target)
    assert not target.exists()


# Temporary files


def test_temporary_names_do_not_begin_with_the_targets(target):
    """ComfyUI counts the files whose names begin with the prefix."""
    with replacing(target, 0) as file:
        name = Path(file.name).name
        assert list(target.parent.iterdir()) == [target.with_name(name)]
    assert name.startswith(".stochastic_fp8-")
    assert name.endswith(".tmp")


def test_the_next_job_in_a_folder_removes_the_files_of_killed_ones_and_not_those_of_running_ones(target):
    others = {"a.safetensors.tmp-mine", f"{OLD_STYLE}.txt", "b.tmp-0123456789abcdef", f"x{HIDDEN}", ".stochastic_fp8"}
    for name in (HIDDEN, OLD_STYLE, "other\nname.safetensors.tmp-0123456789abcdef", *others):
        target.with_name(name).write_bytes(b"left behind")
    with replacing(target, 0) as living:
        assert set(contents(target.parent)) == {*others, Path(living.name).name}
        remove_stale(target.parent)
        write(target.with_name("b.safetensors"))
        assert Path(living.name).exists()
    assert set(contents(target.parent)) == {*others, "a.safetensors", "b.safetensors"}


@pytest.mark.posix
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [HIDDEN, OLD_STYLE])
def test_what_only_has_the_name_of_a_temporary_file_stays(target, name):
    """Opening a pipe would wait until somebody writes to it."""
    other = target.with_name("other")
    other.write_bytes(b"mine")
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda path: os.symlink(other, path),
        lambda path: os.symlink("nowhere", path),
    ):
        trap = target.with_name(name)
        make(trap)
        write(target, overwrite=True)
        assert os.path.lexists(trap)
        assert other.read_bytes() == b"mine"
        trap.rmdir() if trap.is_dir() else trap.unlink()


@pytest.mark.posix
def test_a_temporary_file_that_another_job_takes_for_a_stale_one_is_made_anew(target, monkeypatch):
    """Between its creation and its lock."""
    lock, calls = atomic_file._lock, []

    def slow_lock(file, path):
        calls.append(path)
        if len(calls) == 1:
            remove_stale(target.parent)
        return lock(file, path)

    monkeypatch.setattr(atomic_file, "_lock", slow_lock)
    write(target)
    assert load_file(target).keys() == {"a"}
    assert len(calls) == 2


@pytest.mark.posix
def test_a_disk_without_locks_is_written_to(target, monkeypatch):
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    target.with_name(HIDDEN).touch()
    write(target)
    assert set(contents(target.parent)) == {"a.safetensors", HIDDEN}


JOB = """
    import atexit, importlib, os, resource, signal, sys, threading, types
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    for name, path in (("pack", {root!r}), ("pack.kernels", {root!r} + "/kernels")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
    io = importlib.import_module("pack.kernels.files.writer")
    header = importlib.import_module("pack.kernels.files.header")
    import torch
    tensors = {{"a": header.TensorInfo("uint8", (1 << 20,)), "b": header.TensorInfo("uint8", (1 << 20,))}}
    def job():
        with io.writing({target!r}, tensors, {{}}, overwrite=True) as writer:
            writer.write("a", torch.zeros(1 << 20, dtype=torch.uint8))
            {halfway}
            writer.write("b", torch.zeros(1 << 20, dtype=torch.uint8))
    {before}
    try:
        job()
    except ValueError as error:
        print(error)
"""


def run_job(target, before="pass", halfway="pass"):
    root = str(Path(__file__).resolve().parents[2])
    code = textwrap.dedent(JOB).format(root=root, target=str(target), before=before, halfway=halfway)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.posix
@pytest.mark.parametrize(("number", "left"), [("SIGTERM", 1), ("SIGHUP", 1), ("SIGINT", 1), ("SIGKILL", 2)])
def test_a_signal_half_way_leaves_the_target_as_it_was(target, number, left):
    target.write_bytes(b"mine")
    listen = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # nohup lets programs ignore it
    done = run_job(target, before=listen, halfway=f"os.kill(os.getpid(), signal.{number})")
    assert done.returncode != 0
    assert target.read_bytes() == b"mine"
    assert len(contents(target.parent)) == left
    write(target.with_name("b.safetensors"))
    assert set(contents(target.parent)) == {"a.safetensors", "b.safetensors"}


@pytest.mark.posix
def test_the_file_of_a_thread_that_ends_with_the_process_is_removed(target):
    """As in ComfyUI, where jobs run in a daemon thread and Ctrl+C ends the main one."""
    done = run_job(
        target,
        before="begun = threading.Event(); threading.Thread(target=job, daemon=True).start(); begun.wait(); exit(7)",
        halfway="begun.set(); threading.Event().wait()",
    )
    assert (done.returncode, contents(target.parent)) == (7, {}), done.stderr


@pytest.mark.posix
def test_a_forked_process_does_not_remove_the_files_of_its_parent(target):
    done = run_job(target, halfway="os.fork() or (atexit._run_exitfuncs(), os._exit(0)); os.wait()")
    assert done.returncode == 0, done.stderr
    assert set(contents(target.parent)) == {"a.safetensors"}


@pytest.mark.posix
def test_a_disk_that_fills_up_half_way_leaves_the_target_as_it_was(target):
    target.write_bytes(b"mine")
    done = run_job(target, before="resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 19, 3 << 19))")
    assert done.stdout == "a.safetensors: cannot be written: File too large; nothing was changed\n", done.stderr
    assert contents(target.parent) == {"a.safetensors": b"mine"}


@pytest.mark.posix
def test_the_signal_handler_of_another_program_is_kept(target):
    done = run_job(
        target,
        before="signal.signal(signal.SIGTERM, lambda *_: print('theirs'))",
        halfway="os.kill(os.getpid(), signal.SIGTERM)",
    )
    assert (done.stdout, done.returncode) == ("theirs\n", 0)
    assert set(contents(target.parent)) == {"a.safetensors"}
