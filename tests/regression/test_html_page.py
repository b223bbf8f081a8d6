"""What the reports share: templates, the policy, links that may be followed, files that are written whole."""

from __future__ import annotations

import sys

import pytest

from runner.errors import ConfigInvalid, StorageDenied
from runner.regression.html_page import content_policy, duration, may_be_linked, template_environment, written_whole


def test_without_jinja2_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ConfigInvalid, match=r"jinja2, which is not installed\. pip install 'video-lab-runner\[compare\]'"
    ):
        template_environment("runner.regression", "templates")


def test_templates_escape_and_refuse_names_that_they_do_not_get():
    import jinja2

    environment = template_environment("runner.regression", "templates")
    shown = environment.from_string('<b title="{{ name }}">{{ name }}</b>').render(name="<i>'\"&")
    assert shown == '<b title="&lt;i&gt;&#39;&#34;&amp;">&lt;i&gt;&#39;&#34;&amp;</b>'
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ gone }}").render()


def test_the_policy_allows_no_more_than_it_is_told():
    rules = content_policy("run()", "b{}", "media-src blob:").split("; ")
    assert rules[0] == "default-src 'none'"
    assert rules[1] == "script-src 'sha256-AvyuiL0SD1mVY3NNxR+V2uo+lhk6RMFrytWmRt6CrJQ='"
    assert rules[3:] == ["img-src data:", "media-src blob:", "base-uri 'none'", "form-action 'none'"]


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://a.example/x.mp4", True),
        ("../../jobs/a/output.mp4", True),
        ("file:///out/jobs/a/output.mp4", True),
        ("javascript:alert(1)", False),
        ("java\nscript:alert(1)", False),
        ("//elsewhere.example/x.mp4", False),
        ("s3://bucket/key", False),
        ("", False),
    ],
)
def test_only_addresses_that_a_browser_opens_are_links(url, allowed):
    assert may_be_linked(url) is allowed


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    dest = tmp_path / "folder" / "page.html"
    with written_whole(dest, "media") as (page, media):
        media.write_text("m")
        page.write_text("new")
        assert not dest.exists()
    assert dest.read_text() == "new"

    def fail() -> None:
        with written_whole(dest) as (page,):
            page.write_text("half")
            raise PermissionError(13, "denied")

    with pytest.raises(StorageDenied):
        fail()
    assert dest.read_text() == "new"
    assert [path.name for path in dest.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (12.34, "12.3 s"), (245, "4 min 05 s"), (3720, "1 h 02 min")]
)
def test_durations_have_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text
