"""What pytest does with notebooks: those that solve exercises are slow; the log has what a failed cell has printed."""

import pytest
from nbmake.pytest_items import NotebookFailedException, NotebookItem


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, NotebookItem) and item.path.parent.name == "solutions":
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if call.excinfo and call.excinfo.errisinstance(NotebookFailedException):
        (result,) = call.excinfo.value.args
        cell = result.nb.cells[result.error.failing_cell_index]
        printed = "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")
        if printed:
            report.sections.append(("what the cell has printed", printed))
    return report
