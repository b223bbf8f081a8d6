"""Redact: no planted secret is left, names of parameters and ordinary file names stay."""

from __future__ import annotations

import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runner.redact import escape_control, for_people, redact, redact_tree


@pytest.fixture(autouse=True)
def _no_secret_in_the_environment(monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://user:secret@host/a", "https://user:***@host/a"),
        ("https://user:secret@host:9000/a?b=c", "https://user:***@host:9000/a?b=c"),
        ("https:/user:secret@host/a", "https:/user:***@host/a"),  # as a Path writes it
        (
            "s3://AKIA:se/cr+et@bucket/a/b.mp4: this URI does not name a bucket",
            "s3://AKIA:***@bucket/a/b.mp4: this URI does not name a bucket",
        ),
        ("s3://AKIA:7/ret@bucket/a", "s3://AKIA:***@bucket/a"),
        ("https://user:se@cret@host/a", "https://user:***@host/a"),
        ("https://secret@host/a", "https://***@host/a"),
        ("line 2: jobs[0].https://u:secret@h: unknown key", "line 2: jobs[0].https://u:***@h: unknown key"),
        (
            "/m/clip.mp4?X-Amz-Signature=secret: no such file. Check",
            "/m/clip.mp4?X-Amz-Signature=***: no such file. Check",
        ),
        (
            "s3://b/c.mp4?X-Amz-Credential=a%2Fb&X-Amz-Date=2024&X-Amz-Signature=secret",
            "s3://b/c.mp4?X-Amz-Credential=***&X-Amz-Date=2024&X-Amz-Signature=***",
        ),
        ("a?x=1&amp;Signature=secret&y=2", "a?x=1&amp;Signature=***&y=2"),
        ("file:///a.mp4%3FX-Amz-Signature%3Dsecret%26y", "file:///a.mp4%3FX-Amz-Signature%3D***%26y"),
        ("a?sv=2022&se=2030&sp=r&sig=secret", "a?sv=2022&se=***&sp=***&sig=***"),
        ("{'Authorization': 'AWS4-HMAC-SHA256 Credential=a, Signature=b'}", "{'Authorization': '***'}"),
        ("Authorization: Bearer secret\nnext", "Authorization: ***\nnext"),
        ('{"SSECustomerKey": "secret"}', '{"SSECustomerKey": "***"}'),
        ("aws_session_token=secret, and more", "aws_session_token=***, and more"),
    ],
)
def test_secrets_are_masked_and_other_text_stays(text, masked):
    assert redact(text) == masked
    assert redact(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "what?.png",
        "who?=me.png",
        "take:1@2x.png",
        "s3://bucket/a:b@c.png",
        "https://host:9000/a@b.png",
        "C:/me@home.png",
        "s3://b/k.mp4?versionId=3",
        "key=jobs/a/output.mp4, tokens: 12",
        "options.seed: 41 → 42",
        "贝拉/舞 一.mp4",
        "you are not authorized: ask the owner",
        "***",
    ],
)
def test_redact_of_ordinary_name_changes_nothing(text):
    assert redact(text) == text


PARAMETERS = ["X-Amz-Signature", "x-amz-credential", "X-Amz-Security-Token", "Signature", "AWSAccessKeyId", "sig", "se"]
PARAMETERS += ["sp", "token", "key", "password", "X-Goog-Signature", "access_token"]
SECRET = st.text(string.ascii_letters + string.digits + "+/_-~%", min_size=8, max_size=60).filter(
    lambda text: "%26" not in text and not text[:6].rstrip("/").isdigit()  # an encoded &; looks like a port
)
AROUND = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@st.composite
def planted(draw) -> tuple[str, str]:
    """(text, the secret in it)"""
    secret, name = draw(SECRET), draw(st.sampled_from(PARAMETERS))
    form = draw(
        st.sampled_from(
            [
                "https://user:{s}@host/a",
                "s3://AKIA:{s}@bucket/a/b@c.mp4",
                "/media/clip.mp4?{n}={s}",
                "s3://bucket/a.mp4?x=1&{n}={s}&z=2",
                "file:///a.mp4%3F{n}%3D{s}",
                "Authorization: Bearer {s}",
                "{{'Authorization': 'AWS4-HMAC-SHA256 Credential=a/{s}'}}",
            ]
        )
    )
    before, after = draw(AROUND), draw(AROUND)
    assume(secret not in before + after)
    return f"{before} {form.format(s=secret, n=name)} {after}", secret


@settings(deadline=None, max_examples=400)
@given(planted(), AROUND)
def test_planted_secret_is_masked_and_second_redact_changes_nothing(case, noise):
    text, secret = case
    masked = redact(text)
    assert secret not in masked
    assert redact(masked) == masked
    assume(secret not in noise)
    assert secret not in str(redact_tree({"a": [text, {text: noise}]}))


@settings(deadline=None, max_examples=400)
@given(st.text("ab:/@?&=%3D \"'\nkeysigtoken", max_size=60))
def test_redact_of_redacted_text_changes_nothing(text):
    assert redact(redact(text)) == redact(text)


def test_secrets_of_environment_are_masked_in_any_text(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "short")
    assert redact("x abc/def+ghi y abc%2Fdef%2Bghi abc/def%2Bghi") == "x *** y *** ***"
    assert redact("a short story") == "a short story"


def test_redact_tree_masks_keys_and_values_except_kept_ones():
    tree = {
        "uri": "https://u:secret@h/a",
        "list": ["a?sig=secret", 1, None, True, 2.5],
        "headers": {"Authorization": "Bearer secret"},
        "a?sig=secret": ("b",),
        "key": "jobs/a?key=kept",
        "error": ValueError("a?token=secret"),
    }
    assert redact_tree(tree, keep={"key"}) == {
        "uri": "https://u:***@h/a",
        "list": ["a?sig=***", 1, None, True, 2.5],
        "headers": {"Authorization": "***"},
        "a?sig=***": ["b"],
        "key": "jobs/a?key=kept",
        "error": "a?token=***",
    }


def test_invisible_characters_are_written_as_escapes():
    text = "a\x00b\x1b[31m\u202e\u2066\u200f\x85\r贝\té\n"
    assert escape_control(text) == "a\\x00b\\x1b[31m\\u202e\\u2066\\u200f\\x85\\x0d贝\té\n"
    assert escape_control("a\nb", lines=True) == "a\\nb"
    assert for_people("\x1b?sig=secret") == "\\x1b?sig=***"
