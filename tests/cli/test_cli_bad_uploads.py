"""Every kind of bad upload: exit code 2 and one line, from the check and from training alike."""

import pytest
from bad_uploads import BAD_UPLOADS

from lora_engine.cli import main
from lora_engine.runs import Ledger


@pytest.mark.parametrize("kind", BAD_UPLOADS)
@pytest.mark.parametrize("command", [["data"], ["train", "--data"]])
def test_it_is_refused_with_one_line(capsys, tmp_path, home, kind, command):
    name, content, words = BAD_UPLOADS[kind]
    path = tmp_path / name
    path.write_bytes(content())
    assert main([*command, str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert not Ledger(home).list_runs()
