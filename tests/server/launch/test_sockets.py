"""What a deployment listens on."""

from __future__ import annotations

import stat

import pytest

from server.launch.sockets import http_url, private_directory


def test_the_private_directory_is_private_and_goes():
    with pytest.raises(RuntimeError), private_directory() as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "socket").touch()
        raise RuntimeError
    assert not directory.exists()


def test_the_url_of_an_ipv6_address_has_brackets():
    assert (http_url("127.0.0.1", 80), http_url("::1", 80)) == ("http://127.0.0.1:80", "http://[::1]:80")
