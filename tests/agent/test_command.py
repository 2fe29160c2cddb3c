"""The agent's command line."""

from __future__ import annotations

import pytest

from optwatch.agent.__main__ import main


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_port_that_cannot_be_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not taken, it does not exist: one line says so, with an exit code of its own."""
    with pytest.raises(SystemExit) as ended:
        main(["--port", port])
    assert ended.value.code == 2
    assert f"--port {port}: expected a number of 0 to 65535" in capsys.readouterr().err
