"""The JUnit file, judged by the elements and attributes that CI systems read (the schema of Jenkins' xunit plugin)."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from runner.regression.findings import NightComparison
from runner.regression.html_report import VERDICTS
from runner.regression.junit_report import junit
from tests.regression.report_samples import HOSTILE, make_comparison, make_finding

# Element -> (attributes that must be there, attributes that may be, children). Properties of a test case: as pytest.
SCHEMA = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"time", "skipped", "timestamp", "hostname", "id", "package"},
        {"properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": (
        {"name"},
        {"time", "classname"},
        {"properties", "skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": (set(), {"type", "message"}, set()),
    "error": (set(), {"type", "message"}, set()),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "system-out": (set(), set(), set()),
}
OUTCOMES = {"failed": "error", "broken": "failure", "new": "failure", "missing": "failure"}


def read(comparison: NightComparison) -> ElementTree.Element:
    return ElementTree.fromstring(junit(comparison))


def check_structure(element: ElementTree.Element) -> None:
    needed, allowed, children = SCHEMA[element.tag]
    assert needed <= element.attrib.keys() <= needed | allowed, element.tag
    if "time" in element.attrib:
        assert re.fullmatch(r"[0-9]+\.[0-9]{3}", element.attrib["time"])
    for child in element:
        assert child.tag in children, f"<{child.tag}> in <{element.tag}>"
        check_structure(child)


def test_every_job_is_a_test_case_with_the_outcome_of_its_verdict():
    root = read(make_comparison([make_finding(verdict) for verdict in VERDICTS]))
    check_structure(root)
    suite = root.find("testsuite")
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "8",
        "failures": "3",
        "errors": "1",
        "skipped": "0",
    }
    found = {}
    for case in suite.iter("testcase"):
        verdict = case.find("properties/property[@name='verdict']").get("value")
        outcomes = [child.tag for child in case if child.tag in ("error", "failure")]
        found[verdict] = outcomes
        assert case.get("classname") == "fp4-distill"
        assert case.get("name") == f"{verdict}-job"
    assert found == {verdict: [OUTCOMES[verdict]] if verdict in OUTCOMES else [] for verdict in VERDICTS}


def test_a_failure_says_every_reason_and_the_numbers_are_properties():
    job = make_finding("broken")
    case = read(make_comparison([job])).find("testsuite/testcase")
    assert case.get("time") == "12.340"
    failure = case.find("failure")
    assert failure.get("message") == job.text
    assert failure.get("type") == "broken"
    assert all(breach.text in failure.text for breach in job.breaches)
    values = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
    assert values["psnr_worst"] == "24.6"
    assert values["psnr_worst_frame"] == "33"
    assert values["ssim_worst"] == "0.8612"
    assert values["joint_drift"] == "1.94"
    assert "lpips" not in values  # it was not measured


def test_an_error_says_what_the_job_said():
    job = make_finding("failed")
    assert read(make_comparison([job])).find("testsuite/testcase/error").text == job.error


def test_text_that_xml_cannot_hold_is_cleaned_and_the_rest_stays():
    strange = HOSTILE + "\ufffe\ud800\x0bäöü🙂\r\n"
    job = make_finding("failed", name=strange, error=strange)
    case = read(make_comparison([job], environment=[strange], out=strange)).find("testsuite/testcase")
    # a line end becomes a space in an attribute, as XML says
    assert case.find("error").text.replace("\r\n", "\n") == (
        """</script><script>alert("x")</script> <img src=x onerror=alert(1)> ' " ` | & [31mäöü🙂\n"""
    )
    assert "äöü🙂" in case.get("name")
