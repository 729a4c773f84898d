"""What is uploaded of a run, and which copy of it is kept, with a remote directory in memory."""

import shutil

import pytest
from remote_runs import complete

from mlpmixer_flax.remote import WORKING_COPIES, connect, copy_of, list_files
from mlpmixer_flax.rundir import MARKER, saved_steps
from mlpmixer_flax.training import mirror
from mlpmixer_flax.training.mirror import mirrored

pytestmark = pytest.mark.usefixtures("quick_lock")


class Killed(BaseException):
    """The process is killed here."""


class Mortal:
    """A file system of fsspec that dies after some changes; it uploads files one by one."""

    def __init__(self, fs, changes):
        self._fs, self._left = fs, changes

    def __getattr__(self, name):
        return getattr(self._fs, name)

    def _change(self):
        if not self._left:
            raise Killed
        self._left -= 1

    def pipe_file(self, *args, **options):
        self._change()
        self._fs.pipe_file(*args, **options)

    def rm_file(self, path):
        self._change()
        self._fs.rm_file(path)

    def put(self, files, paths):
        for file, path in zip(files, paths, strict=True):
            self._change()
            self._fs.put_file(file, path)


def make_checkpoint(folder, step, content):
    path = folder / "checkpoints" / str(step)
    shutil.rmtree(path, ignore_errors=True)
    (path / "default" / "d").mkdir(parents=True)
    for name in (MARKER, "commit_success.txt", "default/manifest", f"default/d/{content}"):
        (path / name).write_text(content)


def contents(url):
    """Returns step -> content of the complete checkpoints at a remote path; each must be whole."""
    fs, root = connect(url)
    found = {}
    for step in complete(url):
        texts = {fs.cat_file(path).decode() for path in fs.find(f"{root}/checkpoints/{step}")}
        assert len(texts) == 1 and len(fs.find(f"{root}/checkpoints/{step}")) == 4, texts
        found[step] = texts.pop()
    return found


def changes_of_a_run(copy):
    """Changes a run as training does: a newer checkpoint, an older one removed, one trained again, a row of metrics."""
    make_checkpoint(copy, 30, "new")
    make_checkpoint(copy, 20, "again")
    shutil.rmtree(copy / "checkpoints" / "10")
    (copy / "metrics.jsonl").write_text("{}\n{}\n")


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_kill_at_any_moment_of_an_upload_leaves_whole_checkpoints(tmp_path, monkeypatch, same_machine):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    for changes in range(100):
        url = f"memory://{tmp_path.name}/{changes}"
        copy = copy_of(url, folder=WORKING_COPIES)
        with mirrored(url):
            for step in (10, 20):
                make_checkpoint(copy, step, "old")
            (copy / "metrics.jsonl").write_text("{}\n")
        assert contents(url) == {10: "old", 20: "old"}
        one = mirror._Mirror(url, copy)
        one._fs = Mortal(one._fs, changes)
        changes_of_a_run(copy)
        with one.lock.held():
            try:
                one.upload()
                killed = False
            except Killed:
                killed = True
        found = contents(url)
        # There is always one to continue from.
        assert found.items() <= {10: "old", 20: "old"}.items() | {20: "again", 30: "new"}.items()
        assert 10 in found or 30 in found
        if not same_machine:
            monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / f"other-{changes}"))
            copy = copy_of(url, folder=WORKING_COPIES)
        with mirrored(url):
            here = set(saved_steps(copy))
            assert here == ({20, 30} if same_machine else set(found))
            changes_of_a_run(copy) if not same_machine and 10 in here else None
        if same_machine or 10 in here:
            assert contents(url) == {20: "again", 30: "new"}
            # Nothing is left of interrupted uploads.
            names = [name for name in list_files(*connect(url)) if name.startswith("checkpoints/")]
            assert len(names) == 8, names
        monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
        if not killed:
            assert changes > 12
            return
    raise AssertionError("the upload never ended")


def test_scores_that_are_added_to_a_checkpoint_are_uploaded_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/run"
    with mirrored(url) as copy:
        (copy / "config.json").write_text("{}")
        make_checkpoint(copy, 10, "10")
    fs, root = connect(url)
    marker = f"{root}/checkpoints/10/{MARKER}"
    before = fs.info(marker)["created"]
    with mirrored(url) as copy:
        (copy / "checkpoints" / "10" / "metrics").mkdir()
        (copy / "checkpoints" / "10" / "metrics" / "metrics").write_text("{}")
    assert fs.cat_file(f"{root}/checkpoints/10/metrics/metrics") == b"{}"
    assert fs.info(marker)["created"] == before  # so that the checkpoint was complete all the time


def killed_before_an_upload(url, *steps):
    """A run on this machine that saves these steps, and is killed before it uploads them."""
    one = mirror._Mirror(url, copy_of(url, folder=WORKING_COPIES))
    one.copy.mkdir(parents=True, exist_ok=True)
    with one.lock.held():
        one.begin()
        (one.copy / "config.json").write_text("{}")
        for step in steps:
            make_checkpoint(one.copy, step, f"{step}")


def steps_of_the_next_start(url):
    """The steps from which the next start on this machine may continue; it uploads them."""
    with mirrored(url) as copy:
        steps = saved_steps(copy)
    assert [*contents(url)] == steps
    return steps


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The address of a run, which is not there yet, and a function that goes to the machine of a name."""

    def go_to(machine):
        monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / machine))

    go_to("first")
    return f"memory://{tmp_path.name}/run", go_to


def test_a_run_that_was_never_uploaded_is_kept(run, capsys):
    url, go_to = run
    killed_before_an_upload(url, 10, 20)
    assert steps_of_the_next_start(url) == [10, 20]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("left", ["nothing", "checkpoints/10", "config.json", "mirror.json"])
def test_a_run_that_was_deleted_there_is_uploaded_again(run, left, capsys):
    """The deletion may have ended early, or the run may have written a file again meanwhile."""
    url, _ = run
    killed_before_an_upload(url, 10, 20)
    assert steps_of_the_next_start(url) == [10, 20]
    fs, root = connect(url)
    for path in fs.find(root):
        if not path.startswith(f"{root}/{left}"):
            fs.rm_file(path)
    capsys.readouterr()
    assert steps_of_the_next_start(url) == [10, 20]
    assert fs.cat_file(f"{root}/config.json") == b"{}"
    copy = copy_of(url, folder=WORKING_COPIES)
    note = f"the run in {copy} continues and is uploaded; to begin anew, choose another --workdir\n"
    assert capsys.readouterr().err == ("" if left == "mirror.json" else f"no checkpoint is at {url}: {note}")


def test_a_run_that_another_machine_has_begun_without_a_checkpoint_is_kept(run):
    url, go_to = run
    killed_before_an_upload(url, 10)
    go_to("second")
    killed_before_an_upload(url)
    assert steps_of_the_next_start(url) == []
    go_to("first")
    assert steps_of_the_next_start(url) == [10]
    go_to("second")
    assert steps_of_the_next_start(url) == [10]


def test_a_run_that_another_machine_takes_over_and_does_not_upload_is_kept_on_both(run):
    url, go_to = run
    killed_before_an_upload(url, 10)
    assert steps_of_the_next_start(url) == [10]
    killed_before_an_upload(url, 20)
    go_to("second")
    killed_before_an_upload(url, 30)
    killed_before_an_upload(url, 40)
    go_to("first")
    assert steps_of_the_next_start(url) == [10, 20]
    go_to("second")  # the first has gone on since
    assert steps_of_the_next_start(url) == [10, 20]
    killed_before_an_upload(url, 50)
    assert steps_of_the_next_start(url) == [10, 20, 50]
    go_to("first")
    assert steps_of_the_next_start(url) == [10, 20, 50]


def test_a_run_that_somebody_has_copied_there_replaces_none_that_went_on_from_it(run):
    url, go_to = run
    killed_before_an_upload(url, 10)
    assert steps_of_the_next_start(url) == [10]
    fs, root = connect(url)
    fs.rm_file(f"{root}/mirror.json")  # as in a copy of the run directory of a local run
    go_to("second")
    killed_before_an_upload(url, 20)
    assert steps_of_the_next_start(url) == [10, 20]
    go_to("first")
    assert steps_of_the_next_start(url) == [10, 20]
