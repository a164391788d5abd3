import pytest

from tritflow.formats.atomic import atomic_file, temporary_name, write_atomic


def test_processes_of_one_launcher_write_the_same_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "flags.json"
    monkeypatch.setenv("RANK", "0")
    with atomic_file(path) as first:
        first.write(b"same")
        monkeypatch.setenv("RANK", "3")
        write_atomic(path, b"same")
        assert path.read_bytes() == b"same"
    assert path.read_bytes() == b"same"
    assert [p.name for p in tmp_path.iterdir()] == ["flags.json"]


def test_a_killed_process_leaves_what_its_next_run_overwrites(tmp_path, monkeypatch):
    path = tmp_path / "flags.json"
    monkeypatch.delenv("RANK", raising=False)
    temporary_name(path).write_bytes(b"half")
    write_atomic(path, b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["flags.json"]


def test_an_error_while_writing_leaves_the_former_file(tmp_path):
    path = tmp_path / "flags.json"
    write_atomic(path, b"former")

    def half():
        with atomic_file(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_bytes() == b"former"
    assert len(list(tmp_path.iterdir())) == 1
