"""manage/binding.py: what it writes can be played, is exact where it can be, whole or absent."""

from __future__ import annotations

import array
import functools
import itertools
import math
import os
import random
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import binding
import pytest
from binding import (
    FORMATS,
    RATE,
    BindingError,
    Loudness,
    Mark,
    bind,
    check_output,
    gain_for,
    level,
    measure,
    silence,
)

MARKS = [Mark("Über den Wolken", 0.0, 1.25), Mark("第二章", 1.25, 3.0), Mark("III", 3.0, 4.0)]


@functools.cache
def tone(seconds: float, peak: float = 0.25, hertz: float = 220.0) -> bytes:
    """A tone that starts and ends in the middle of its swing."""
    step = 2 * math.pi * hertz / RATE
    return array.array("h", (round(32767 * peak * math.cos(step * n))
                             for n in range(round(seconds * RATE)))).tobytes()


def picture(codec: str, pixels: str) -> bytes:
    context = av.CodecContext.create(codec, "w")
    context.width = context.height = 32
    context.pix_fmt, context.time_base = pixels, Fraction(1)
    frame = av.VideoFrame(32, 32, pixels)
    return b"".join(map(bytes, [*context.encode(frame), *context.encode(None)]))


JPEG, PNG = picture("mjpeg", "yuvj420p"), picture("png", "rgb24")


def played(path: Path) -> bytes:
    """What a player makes of a file, as int16 at RATE."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
    with av.open(str(path)) as container:
        frames = [*container.decode(audio=0), None]
    return b"".join(bytes(each.planes[0])[: each.samples * 2]
                    for frame in frames for each in resampler.resample(frame))


def samples(pcm: bytes) -> array.array[int]:
    return array.array("h", pcm)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_what_is_lossless_comes_back_sample_for_sample(tmp_path: Path, suffix: str) -> None:
    pcm = tone(2.3) + silence(0.2) + tone(0.7, 0.9)
    out = tmp_path / f"whole{suffix}"
    bind(out, [pcm[:2], b"", pcm[2:100_000], pcm[100_000:]])
    assert played(out) == pcm


def test_a_wav_tells_its_true_sizes(tmp_path: Path) -> None:
    out = tmp_path / "a.wav"
    bind(out, [tone(1.0)], title="T")
    data = out.read_bytes()
    at = data.index(b"data")
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    assert int.from_bytes(data[at + 4 : at + 8], "little") == len(data) - at - 8 == 2 * RATE


@pytest.mark.parametrize("suffix", [".mp3", ".opus", ".m4b"])
def test_what_is_coded_with_loss_is_as_long_and_begins_where_it_did(
        tmp_path: Path, suffix: str) -> None:
    pcm = silence(0.5) + tone(0.5) + silence(0.377)
    out = tmp_path / f"a{suffix}"
    bind(out, [pcm])
    heard = samples(played(out))
    loud = [at for at, each in enumerate(heard) if abs(each) > 3000]
    assert loud[0] == pytest.approx(0.5 * RATE, abs=250)
    assert loud[-1] == pytest.approx(1.0 * RATE, abs=250)
    if suffix == ".m4b":  # its last block is played to the end, by what it says it is shorter
        with av.open(str(out)) as container:
            assert container.duration == pytest.approx(1_377_000, abs=1000)
    else:
        assert len(heard) == len(pcm) // 2


@pytest.mark.parametrize("suffix", [".mp3", ".opus", ".flac", ".m4b"])
def test_a_file_has_its_chapters_with_their_titles_and_starts(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"a{suffix}"
    bind(out, [tone(4.0)], MARKS)
    with av.open(str(out)) as container:
        found = [(each["metadata"]["title"], float(each["start"] * each["time_base"]))
                 for each in container.chapters()]
    assert found == [(mark.title, mark.start) for mark in MARKS]


@pytest.mark.parametrize(("suffix", "count"), [
    (".mp3", 255), (".opus", 300), (".flac", 300), (".m4b", 300)])
def test_a_book_of_many_chapters_has_all_that_its_kind_can_count(
        tmp_path: Path, suffix: str, count: int) -> None:
    out = tmp_path / f"a{suffix}"
    bind(out, [silence(3.0)], [Mark(f"{n}", n / 100, (n + 1) / 100) for n in range(300)])
    with av.open(str(out)) as container:
        assert [each["metadata"]["title"] for each in container.chapters()] == \
            [f"{n}" for n in range(count)]
    if suffix == ".mp3":  # flags, and how many the table of contents has
        at = out.read_bytes().index(b"CTOC")
        assert out.read_bytes()[at + 10 :].startswith(b"toc\0\x03\xff")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_has_its_title_author_and_language(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"a{suffix}"
    bind(out, [tone(0.5)], title="Das Schloß", author="Кафка", language="de")
    with av.open(str(out)) as container:
        tags = {**container.streams.audio[0].metadata, **container.metadata}
    assert (tags["title"], tags["artist"], tags["album"]) == ("Das Schloß", "Кафка", "Das Schloß")
    assert tags["language"] == "deu"


@pytest.mark.parametrize("cover", [JPEG, PNG], ids=["jpeg", "png"])
@pytest.mark.parametrize("suffix", [".mp3", ".opus", ".flac", ".m4b"])
def test_a_file_has_its_cover(tmp_path: Path, suffix: str, cover: bytes) -> None:
    out = tmp_path / f"a{suffix}"
    bind(out, [tone(0.5)], MARKS, cover=cover)
    with av.open(str(out)) as container:
        (shown,) = container.streams.video
        assert shown.disposition == av.stream.Disposition.attached_pic
        assert bytes(next(container.demux(shown))) == cover


def test_a_broken_cover_is_left_out(tmp_path: Path) -> None:
    for number, cover in enumerate((b"no picture", JPEG[:40], PNG[:40])):
        out = tmp_path / f"{number}.m4b"
        bind(out, [tone(0.5)], cover=cover)
        with av.open(str(out)) as container:
            assert len(container.streams.video) == 0 and container.duration


def test_an_m4b_is_an_audiobook_whose_head_comes_first(tmp_path: Path) -> None:
    out = tmp_path / "a.M4B"
    bind(out, [tone(0.5)], MARKS)
    data = out.read_bytes()
    assert data[4:12] == b"ftypM4B " and b"stik" in data
    assert data.index(b"moov") < data.index(b"mdat")


def test_the_same_speech_gives_the_same_file(tmp_path: Path) -> None:
    for suffix in FORMATS:
        one, other = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"
        bind(one, [tone(1.5)], MARKS, title="T", cover=JPEG)
        bind(other, [tone(1.5)], MARKS, title="T", cover=JPEG)
        assert one.read_bytes() == other.read_bytes()


# -----------------------------------------------------------------------------
# Loudness and joins


@pytest.mark.parametrize("peak", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("seconds", [0.15, 0.39, 1.0, 7.77])
def test_parts_of_any_length_and_level_come_to_one_loudness(peak: float, seconds: float) -> None:
    part = tone(seconds, peak)
    louder = level(part, gain_for(measure(part)))
    assert measure(louder).lufs == pytest.approx(binding.TARGET, abs=0.6) and \
        len(louder) == len(part)


def test_loudness_is_what_r128_says_of_its_own_tone() -> None:
    """EBU Tech 3341: a sine of 1 kHz with a peak of -20 dB is at -23 LUFS in one channel."""
    told = measure(tone(5.0, 10 ** (-20 / 20), 997.0))
    assert told.lufs == pytest.approx(-23.0, abs=0.1) and told.peak == pytest.approx(-20, abs=0.1)


def test_silence_around_a_speech_leaves_its_gain() -> None:
    speech = tone(3.0)
    among = silence(2.0) + speech + silence(4.0)
    assert gain_for(measure(among)) == pytest.approx(gain_for(measure(speech)), abs=0.6)


def test_no_part_is_made_so_loud_that_it_clips() -> None:
    """A few loud beats in a soft speech leave no room."""
    part = tone(2.0, 0.02) + tone(0.01, 0.9) + tone(2.0, 0.02)
    louder = measure(level(part, gain_for(measure(part))))
    assert louder.peak <= -0.9 and louder.lufs < binding.TARGET - 3


def test_a_peak_in_the_last_moments_counts() -> None:
    assert measure(tone(2.0, 0.02) + tone(0.03, 0.9)).peak > -2


def test_noise_is_lifted_only_so_far_and_silence_not_at_all() -> None:
    assert gain_for(measure(tone(1.0, 0.001))) == binding.MAX_GAIN
    for nothing in (b"", silence(0.1), silence(3.0)):
        assert measure(nothing) == Loudness(-70.0, -70.0) and gain_for(measure(nothing)) == 0.0


def test_a_gain_is_exact_and_the_same_each_time() -> None:
    part = tone(1.0)
    louder = level(part, 6.02)
    inner = slice(binding.FADE, -binding.FADE)
    factor = 10 ** (6.02 / 20)
    assert all(abs(new - old * factor) <= 1 for old, new in
               zip(samples(part)[inner], samples(louder)[inner], strict=True))
    assert level(part, 6.02) == louder and level(part, 0.0)[480:-480] == part[480:-480]


def test_where_speech_and_silence_meet_there_is_no_click() -> None:
    joined = samples(silence(0.1) + level(tone(0.5, 0.9), 0.0) + silence(0.1))
    steps = [abs(b - a) for a, b in itertools.pairwise(joined)]
    swing = 2 * math.pi * 220 / RATE * 0.9 * 32767  # the tone's own steepest step
    assert max(steps) <= 1.1 * swing
    assert level(tone(1 / RATE), 0.0) == tone(1 / RATE) and level(b"", 3.0) == b""


@pytest.mark.parametrize(("suffix", "rate"), [
    (".wav", 48_000), (".mp3", 12_000), (".opus", 6_000), (".m4b", 8_000)])
def test_a_file_takes_what_its_bit_rate_says_and_no_more_than_the_estimate(
        tmp_path: Path, suffix: str, rate: int) -> None:
    out = tmp_path / f"a{suffix}"
    bind(out, [random.Random(1).randbytes(10 * 2 * RATE)])
    size = out.stat().st_size
    assert size == pytest.approx(10 * rate, rel=0.12)
    assert size <= 10 * binding.KINDS[suffix].size + 4096


# -----------------------------------------------------------------------------
# What goes wrong


def refusal(out: Path, seconds: float = 1.0) -> str:
    with pytest.raises(BindingError) as caught:
        check_output(out, seconds)
    return str(caught.value)


def test_what_cannot_be_written_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "folder.mp3").mkdir()
    assert "use one of .wav, .mp3, .opus, .flac, .m4b" in refusal(tmp_path / "a.ogg")
    assert "no suffix" in refusal(tmp_path / "a")
    assert "make it first" in refusal(tmp_path / "absent" / "a.mp3")
    assert "is a folder" in refusal(tmp_path / "folder.mp3")
    for suffix in FORMATS:
        check_output(tmp_path / f"a{suffix}", 60)


def test_a_wav_that_cannot_tell_its_size_is_refused_before_it_begins(tmp_path: Path) -> None:
    hours = 3600.0
    said = refusal(tmp_path / "a.wav", 25 * hours)
    assert "4.32 GB" in said and ".flac" in said and ".m4b" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binding.shutil, "disk_usage", lambda _: os.statvfs_result)
        patch.setattr(os.statvfs_result, "free", 2**50, raising=False)
        check_output(tmp_path / "a.wav", 24.8 * hours)
        check_output(tmp_path / "a.flac", 100 * hours)


def test_a_wav_that_grows_past_its_limit_is_given_up(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "MAX_WAV", 2 * RATE * 3)
    with pytest.raises(BindingError, match="a WAV can have"):
        bind(tmp_path / "a.wav", [tone(1.0)] * 3)
    bind(tmp_path / "a.flac", [tone(1.0)] * 3)
    assert os.listdir(tmp_path) == ["a.flac"]


def test_too_full_a_disk_is_refused_before_it_begins(tmp_path: Path) -> None:
    said = refusal(tmp_path / "a.flac", 1e12)
    assert "free; make room" in said and "GB" in said


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("suffix", FORMATS)
def test_what_breaks_off_leaves_the_old_file_and_nothing_else(
        tmp_path: Path, suffix: str, raised: type[BaseException]) -> None:
    def sounds() -> Iterator[bytes]:
        yield tone(1.0)
        raise raised
    out = tmp_path / f"a{suffix}"
    out.write_bytes(b"the old one")
    with pytest.raises(raised):
        bind(out, sounds(), MARKS, cover=JPEG)
    assert os.listdir(tmp_path) == [out.name] and out.read_bytes() == b"the old one"


LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import binding
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = bytes(range(1, 251)) * 4000
for out in sys.argv[2:]:
    try:
        binding.bind(Path(out), [noise] * 3, [binding.Mark("One", 0.0, 9.0)])
    except binding.BindingError as error:
        print(error)
"""


def test_a_write_that_the_disk_refuses_is_said_and_leaves_the_old_file(tmp_path: Path) -> None:
    """The system refuses what passes a limit of 20 kB, with EFBIG in place of ENOSPC."""
    outs = [tmp_path / f"a{suffix}" for suffix in FORMATS]
    for out in outs:
        out.write_bytes(b"the old one")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, Path(binding.__file__).parent, *outs], capture_output=True,
        text=True, timeout=60, check=False)
    assert done.stderr == "" and done.stdout.splitlines() == [
        f"{out} could not be written: File too large" for out in outs]
    assert sorted(tmp_path.iterdir()) == sorted(outs)
    assert {out.read_bytes() for out in outs} == {b"the old one"}


def test_what_an_earlier_try_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".a.wav.part").write_bytes(b"x" * 10**6)
    bind(tmp_path / "a.wav", [tone(1.0)])
    assert os.listdir(tmp_path) == ["a.wav"] and played(tmp_path / "a.wav") == tone(1.0)


def test_names_that_look_like_addresses_are_files(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bind(Path("http:a%d.wav"), [tone(0.1)])
    assert os.listdir(tmp_path) == ["http:a%d.wav"]


def test_half_a_sample_is_no_sound(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 bytes"):
        bind(tmp_path / "a.wav", [b"abc"])


def test_a_long_book_is_told_of_and_takes_little_memory(tmp_path: Path) -> None:
    told: list[float] = []
    minute = tone(1.0) * 60
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bind(tmp_path / "a.wav", (bytes(bytearray(minute)) for _ in range(60)), on_progress=told.append)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told == [60.0 * (index + 1) for index in range(60)]
    assert peak < 5 * len(minute) and grown < 60_000  # kB; an hour is 173 MB
