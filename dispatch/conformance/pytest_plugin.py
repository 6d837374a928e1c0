"""The suite as a pytest plugin: one item for each check, or parameters for a test of your own.

    pytest --attn-dispatch-verify MY_BACKEND
    pytest --attn-dispatch-verify MY_BACKEND --attn-dispatch-emulate gfx942

Every pytest of an environment with attn-dispatch loads this module: so it imports only pytest, and
the rest when the option is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attn_dispatch.conformance.check import Check

__all__ = ["assert_conforms", "conformance_checks"]


def conformance_checks(
    name: str, device: str | None = None, *, quick: bool = False, emulate: str | None = None
) -> list[Any]:
    """The checks of a registered backend, to parametrize a test with.

    Args:
        name: the backend's.
        device: cpu, cuda, cuda:1; None for the default device.
        quick: fewer checks.
        emulate: a GPU, such as "gfx942" or "sm90", to emulate on the CPU; instead of device.

    Raises:
        UnknownBackendError, BackendFailure: there is no such backend, or it cannot be loaded.
        UnsupportedError, InvalidInputError: it cannot be verified on the device.

    Example:
        >>> @pytest.mark.parametrize("check", conformance_checks("MY_BACKEND", "cuda"))
        ... def test_my_backend(check):
        ...     assert_conforms(check)
    """
    from attn_dispatch.conformance import backend_named, checks_for

    checks = checks_for(backend_named(name), device, quick=quick, emulate=emulate)
    return [pytest.param(check, id=check.full_name) for check in checks]


def assert_conforms(check: Check) -> None:
    """Run a check inside of a test; the test fails or is skipped if the check is."""
    from attn_dispatch.conformance import run

    outcome = run(check)
    if outcome.status == "skipped":
        pytest.skip(outcome.message)
    if outcome.status == "failed":
        pytest.fail(f"{check.full_name}: {outcome.message}\n{check.spec}", pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("attn-dispatch", "conformance of attention backends")
    group.addoption(
        "--attn-dispatch-verify",
        action="append",
        default=[],
        metavar="NAME",
        help="Collect the checks that this registered backend must pass; repeatable.",
    )
    group.addoption("--attn-dispatch-device", metavar="DEVICE", help="cpu, cuda or cuda:1.")
    group.addoption(
        "--attn-dispatch-emulate",
        metavar="ARCH",
        help="A GPU, such as gfx942, to emulate on the CPU; instead of a device.",
    )
    group.addoption("--attn-dispatch-quick", action="store_true", help="Fewer checks.")


class _Checks(pytest.Collector):
    """The checks of the backend of this name."""

    def collect(self) -> Iterator[pytest.Item]:
        option = self.config.getoption
        device, quick = option("--attn-dispatch-device"), option("--attn-dispatch-quick")
        emulate = option("--attn-dispatch-emulate")
        for parameters in conformance_checks(self.name, device, quick=quick, emulate=emulate):
            (check,) = parameters.values
            yield _Item.from_parent(self, name=check.full_name, check=check)


class _Item(pytest.Item):
    """One check."""

    def __init__(self, *, check: Check, **more: Any) -> None:
        super().__init__(**more)
        self._check = check

    def runtest(self) -> None:
        assert_conforms(self._check)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.parent.name if self.parent else ''}: {self.name}"


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the items
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add the checks of the backends that are named."""
    names = config.getoption("--attn-dispatch-verify")
    if not names:
        return
    try:
        from attn_dispatch.errors import AttnDispatchError

        for name in names:
            collector = _Checks.from_parent(session, name=name)
            found = list(collector.collect())
            items += found
            # Reported as for every other collector, or the terminal's count is wrong.
            report = pytest.CollectReport(collector.nodeid, "passed", None, [*found])
            config.hook.pytest_collectreport(report=report)
    except AttnDispatchError as error:
        raise pytest.UsageError(f"--attn-dispatch-verify {name}: {error}") from error
    except ImportError as error:
        raise pytest.UsageError(
            f"--attn-dispatch-verify needs the packages that attn-dispatch depends on: {error}."
        ) from error
