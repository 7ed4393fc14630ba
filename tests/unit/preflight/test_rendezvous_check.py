"""The rendezvous check on one machine; tests/run/test_nodes.py runs it on two hosts."""

import socket
import subprocess
import sys
import threading

import pytest

from agnews_dist.preflight.rendezvous_check import check_rendezvous, main


def test_check_rendezvous_of_one_node_on_a_free_port():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        taken = check_rendezvous("localhost", port, num_nodes=1, node=0)
    assert taken.verdict == "fail"
    assert f"port {port} of {socket.gethostname()} is taken by process" in taken.found
    assert check_rendezvous("localhost", port, num_nodes=1, node=0).verdict == "ok"


def test_check_rendezvous_refuses_loopback_for_several_nodes():
    finding = check_rendezvous("localhost", 29400, num_nodes=2, node=0)
    assert finding.verdict == "fail"
    assert "which means each node itself" in finding.found


@pytest.mark.parametrize("endpoint", ["node1", ":29400", "node1:port", "node1:0", "node1:65536"])
def test_main_refuses_a_wrong_endpoint(capsys, endpoint):
    with pytest.raises(SystemExit) as ended:
        main(["--endpoint", endpoint])
    assert ended.value.code == 2
    assert f"--endpoint {endpoint}: must be HOST:PORT" in capsys.readouterr().err


def test_main_prints_interface_and_address(capsys):
    assert main(["--endpoint", "127.0.0.1:29400", "--print_interface"]) == 0
    assert capsys.readouterr().out == "lo 127.0.0.1\n"


def test_module_loads_no_torch():
    code = "import sys; import agnews_dist.preflight.rendezvous_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_main_waits_for_the_first_node(capsys):
    with socket.create_server(("", 0)) as server:
        words = ["--endpoint", f"localhost:{server.getsockname()[1]}", "--wait"]
        assert main([*words, "1"]) == 1
        assert " is taken by process " in capsys.readouterr().err
        closing = threading.Timer(0.5, server.close)
        closing.start()
        assert main([*words, "60"]) == 0
        closing.join()
    assert ": waiting up to 60 s" in capsys.readouterr().err
