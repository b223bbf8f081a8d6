"""JUnit report: the results of `compare`, for the test view of a CI system.

In:   a `NightComparison`. Out: XML of one test suite with one test case per job. Never: how a verdict is made.

A failed job is an error. A broken limit, a new job and a missing job are failures. All other jobs pass.
"""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from runner.regression.findings import JobFinding, NightComparison
from runner.regression.judge import DIFFERS

__all__ = ["junit"]

SUITE = "video-lab compare"
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2


def junit(comparison: NightComparison) -> bytes:
    """Return the suite in UTF-8. Characters that XML does not allow are left out."""
    cases = [_case(job) for job in comparison.jobs]
    numbers = {
        "tests": len(cases),
        "failures": sum(job.verdict in DIFFERS for job in comparison.jobs),
        "errors": sum(job.verdict == "failed" for job in comparison.jobs),
        "time": _seconds(sum(job.seconds or 0.0 for job in comparison.jobs)),
    }
    root = _element("testsuites", **numbers)
    suite = _element("testsuite", name=SUITE, **numbers, skipped=0, timestamp=comparison.made_at)
    facts = {"out": comparison.out, "baseline": comparison.baseline, "exit_code": comparison.exit_code}
    _add_properties(suite, facts | {"approve": comparison.approve})
    suite.extend(cases)
    if comparison.environment:
        SubElement(suite, "system-out").text = _clean("\n".join(["The environment differs:", *comparison.environment]))
    root.append(suite)
    indent(root)
    return bytes(tostring(root, encoding="utf-8", xml_declaration=True))


def _case(job: JobFinding) -> Element:
    case = _element("testcase", classname=job.recipe or SUITE, name=job.id, time=_seconds(job.seconds or 0.0))
    _add_properties(case, _properties(job))
    why = "\n".join([*(breach.text for breach in job.breaches), *job.differences, *job.notes])
    if job.verdict == "failed":
        _add_outcome(case, "error", job, job.error or why)
    elif job.verdict in DIFFERS:
        _add_outcome(case, "failure", job, why or job.text)
    elif job.verdict != "identical":
        SubElement(case, "system-out").text = _clean("\n".join([job.text, *filter(None, [why])]))
    return case


def _add_outcome(case: Element, kind: str, job: JobFinding, text: str) -> None:
    outcome = _element(kind, type=job.verdict, message=job.text)
    outcome.text = _clean(text)
    case.append(outcome)


def _properties(job: JobFinding) -> dict[str, object]:
    """Return the known facts of the job by name."""
    found: dict[str, object] = {
        "verdict": job.verdict,
        "device": job.device or None,
        "baseline_device": job.baseline_device or None,
        "first_frame": job.first_frame,
        "frames_differing": job.frames_differing,
        "seconds_median": job.seconds_median,
    }
    if (measured := job.measurements) is not None:
        for name, metric in (("psnr", measured.psnr), ("ssim", measured.ssim)):
            if metric is not None:
                found |= {
                    f"{name}_worst": metric.worst,
                    f"{name}_worst_frame": metric.worst_frame,
                    f"{name}_mean": metric.mean,
                }
        found |= {"largest_difference": measured.largest_difference, "colour": measured.colour}
        found["joint_drift"] = measured.drift.joint_drift if measured.drift is not None else None
        if measured.identity is not None:
            found |= {
                name: getattr(measured.identity, name) for name in ("cosine", "lpips", "face_distance", "face_worst")
            }
    return {name: value for name, value in found.items() if value is not None}


def _add_properties(parent: Element, values: dict[str, object]) -> None:
    properties = SubElement(parent, "properties")
    for name, value in values.items():
        properties.append(_element("property", name=name, value=f"{value:.6g}" if isinstance(value, float) else value))


def _element(tag: str, **attributes: object) -> Element:
    return Element(tag, {name: _clean(str(value)) for name, value in attributes.items()})


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}"


def _clean(text: str) -> str:
    return NOT_IN_XML.sub("", text)
