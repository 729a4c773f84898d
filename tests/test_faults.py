"""Tests how faults of the environment are told apart from bad input and from bugs, by exceptions as libraries raise them."""

import errno
import os

import pytest
from faulty_machine import fill, small_disk

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.faults import check_reachable, check_readable, explain, is_memory, naming, pass_on

# As TensorStore, array_record, CPython, XLA, the loader of libraries and Grain word them.
FULL = (
    'RESOURCE_EXHAUSTED: Error writing "params/0": Failed to write 81085 bytes to file 21: No space left on device '
    "[os_error_code='28']"
)
WORDS = [
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), "no space is left on the disk (a/b): make room there"),
    (ValueError(FULL), "no space is left on the disk: make room there"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "your disk quota is used up: remove files, or ask for more"),
    (OSError(errno.EIO, "Input/output error", "a"), "the disk reports an input/output error (a): check the disk and"),
    (OSError(errno.EROFS, "Read-only file system", "a"), "the file system is read-only (a): choose another, or"),
    (PermissionError(errno.EACCES, "Permission denied", b"caf\xe9"), r"you have no permission (caf\xe9): change it "),
    (ValueError("PERMISSION_DENIED: x: Permission denied [os_error_code='13']"), "you have no permission: change"),
    (OSError(errno.EMFILE, "Too many open files", "a"), "too many files are open (a): raise the limit (ulimit -n)"),
    (RuntimeError("Resource temporarily unavailable"), "the system starts no more threads or processes: end other"),
    (RuntimeError("can't start new thread"), "the system starts no more threads or processes: end other programs"),
    (MemoryError(), "not enough memory: end other programs that use it"),
    (MemoryError("Unable to allocate 3 GiB"), "not enough memory (Unable to allocate 3 GiB): end other programs"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory ([Errno 12] Cannot allocate memory): end"),
    (RuntimeError("std::bad_alloc"), "not enough memory (std::bad_alloc): end other programs that use it"),
    (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 16 bytes.\nmore"),
        "not enough memory (Out of memory allocating 16 bytes): end other programs that use it",
    ),
    (ImportError("x.so: failed to map segment from shared object"), "not enough memory (x.so: failed to map segment"),
    (
        RuntimeError("FAILED_PRECONDITION: DNN library initialization failed. Look above."),
        "the GPU's libraries do not start (FAILED_PRECONDITION: DNN library initialization failed. Look above): end",
    ),
    (
        RuntimeError("cudaErrorInsufficientDriver : CUDA driver version is insufficient for CUDA runtime version"),
        "the driver of the GPU is too old for this JAX (cudaErrorInsufficientDriver : CUDA driver version is",
    ),
    (
        RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs above"),
        "a process that reads images was ended by SIGKILL, as the system does when memory runs out: end other",
    ),
    (FileNotFoundError(errno.ENOENT, "No such file", "a"), "a does not exist any more: restore it, or begin again"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words"), WORDS, ids=lambda part: repr(part)[:60])
def test_a_fault_is_explained_in_one_sentence_that_says_what_to_do(error, words):
    sentence = explain(error)
    assert sentence is not None and sentence.startswith(words) and "\n" not in sentence and ": " in sentence
    assert is_memory(error) == words.startswith("not enough memory")


# Pillow's decoders say "out of memory" of files that are damaged, too.
NOT_FAULTS = [
    ValueError("a bug"),
    KeyError("memory"),
    RuntimeError("Worker process was terminated unexpectedly with exit code 1."),
    OSError("out of memory error when reading image file"),
    OSError(errno.EISDIR, "Is a directory", "a"),
]


@pytest.mark.parametrize("error", NOT_FAULTS, ids=repr)
def test_any_other_error_is_not_explained_and_not_passed_on(error):
    assert explain(error) is None
    pass_on(error, "a")


def test_notes_follow_the_sentence_except_those_of_libraries():
    error = MemoryError()
    error.add_note("lower batch_size")
    error.add_note("--------------------\nFor simplicity, JAX has removed its internal frames")
    assert explain(error) == "not enough memory: end other programs that use it; lower batch_size"


def test_what_is_passed_on_names_the_path_and_is_a_user_error_only_without_permission():
    with pytest.raises(OSError, match="No space left on device: 'run'") as full:
        pass_on(ValueError(FULL), "run")
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(UserError, match=r"^you have no permission \(run\): "):
        pass_on(OSError(errno.EACCES, "Permission denied", "run/tmp"), "run")
    memory = MemoryError("lots")
    with pytest.raises(MemoryError) as passed:
        pass_on(memory, "run")
    assert passed.value is memory
    pass_on(FileNotFoundError(errno.ENOENT, "No such file", "a"), "a")  # for the caller to judge


def test_an_error_of_an_open_file_gets_its_name(tmp_path):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"), naming("/dev/full"):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    with pytest.raises(FileNotFoundError, match="/missing'"), naming("another"):
        (tmp_path / "missing").read_bytes()


def test_what_may_be_read_passes_the_checks(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("b")
    (tmp_path / "a" / "link").symlink_to("nowhere")
    check_readable(tmp_path)
    for path in (tmp_path / "a" / "b", tmp_path / "missing", "imagenet21k/Mixer-B_16", "x" * 5000, "a\0b"):
        check_reachable(path)


def test_a_file_that_replaces_another_stays_as_it_was_on_a_full_disk(tmp_path):
    with small_disk(tmp_path / "disk", 100) as disk:
        file = disk / "weights"
        file.write_text("old")
        filling = fill(disk, leave_kb=8)
        with pytest.raises(OSError, match=f"No space left on device: '{file}'"), replacing(file) as new:
            new.write(bytes(50_000))
        assert file.read_text() == "old" and sorted(os.listdir(disk)) == ["filling", "weights"]
        filling.unlink()
        with replacing(file) as new:
            new.write(bytes(50_000))
