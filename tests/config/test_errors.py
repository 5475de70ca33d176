import pickle

import pytest

from vllm_kvpress import errors
from vllm_kvpress.errors import KVPressError, shown


def test_message_holds_what_got_allowed_and_fix():
    error = KVPressError("x is wrong", got="3", allowed="1, 2", fix="Use 1")

    assert str(error) == "x is wrong; got 3; allowed: 1, 2. Use 1."


def test_parts_may_be_missing():
    assert str(KVPressError("x is wrong")) == "x is wrong."
    assert str(KVPressError("x is wrong", fix="Did you mean 'y'?")).endswith("'y'?")


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "shown"])
def test_errors_cross_processes(name):
    error_class = getattr(errors, name)
    error = error_class("what", got="g", allowed="a", fix="f")

    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes

    assert type(copy) is error_class
    assert str(copy) == str(error)
    assert isinstance(copy, KVPressError)
    assert isinstance(copy, ValueError)


def test_shown_is_short_and_never_fails():
    class Bad:
        def __repr__(self):
            raise RuntimeError("no")

    assert shown("a") == "'a'"
    assert len(shown("x" * 1000)) == 80
    assert "RuntimeError" in shown(Bad())
    assert "int" in shown(10**5000)
