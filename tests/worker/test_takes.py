"""Takes: each defect planted and caught, good ones let pass, edges, loudness, tries that end."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import BUILTIN, Worker, running_worker
from engines import Bench
from test_speech import ADJECTIVES, ANIMALS, PLACES

RATE = 24_000
SECONDS = 4.0  # of the speech below, and what its text should take
DIGITS = "7 3 9 1 4 7 3 9 1 4 7 3 9 1 4 7 3 9 1 4"  # 8 s, of which the toy, urged, leaves a quarter


# What stands for speech

def speech(seconds: float = SECONDS, level: float = -20.0) -> np.ndarray:
    """Syllables of a buzzing voice at `level` dBFS, with a hiss like an s between some of them."""
    random = np.random.default_rng(7)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 110 + 15 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(np.sin(n * phase) / n for n in range(1, 25))
    syllables = np.abs(np.sin(2 * np.pi * 2.2 * time)) ** 0.5
    hiss = 0.1 * random.standard_normal(len(time)) * (syllables < 0.35)
    sound = voice * syllables + hiss
    return (sound * 10 ** (level / 20) / np.sqrt(np.mean(sound**2))).astype(np.float32)


def noise(seconds: float, level: float = -25.0) -> np.ndarray:
    random = np.random.default_rng(3)
    return (random.standard_normal(round(seconds * RATE)) * 10 ** (level / 20)).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return noise(seconds, -75.0)


def join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)


def with_nan(samples: np.ndarray) -> np.ndarray:
    samples[1000] = np.nan
    return samples


def level_of(samples: np.ndarray) -> float:
    return 10 * math.log10(float(np.mean(np.square(samples, dtype=np.float64))))


# Judging. What the detector hears is told here; test_hearing has the detector itself.

def judged(bark: ModuleType, samples: np.ndarray, seconds: float = SECONDS,
           heard: tuple[tuple[float, float], ...] | None = None, text: str = "Words.") -> Any:
    """The verdict on a take of a text of about so many seconds."""
    return bark.judge(samples, RATE, bark.Wanted(seconds, text), bark.Hearing(heard))


WHOLE = ((0.0, SECONDS),)


@pytest.mark.parametrize(("kind", "defect", "samples", "heard"), [
    ("not_finite", "not finite", with_nan(speech()), WHOLE),
    ("silent", "silent", silence(SECONDS), ()),
    ("silent", "silent", np.zeros(RATE, np.float32), ()),
    ("silent", "silent", np.zeros(0, np.float32), ()), ("silent", "silent", speech(level=-60), ()),
    ("clipped", "clipped", np.clip(8 * speech(), -1, 1), WHOLE),
    ("silence", "s of silence inside", join(speech(1.5), silence(2.5), speech(1.5)), None),
    ("short", "s for a text of about 4.0 s", speech(1.2), None),
    ("short", "s for a text of about 4.0 s", speech(2.0), None),
    ("long", "s for a text of about 4.0 s", speech(8), None),
    ("noise", "2.0 s of noise or music around the speech", join(speech(), noise(2)), WHOLE),
    ("noise", "1.5 s of noise or music around the speech", join(speech(), silence(.5), noise(1.5)),
     WHOLE),
    ("noise", "2.0 s of noise or music around the speech", join(noise(2), speech()), ((2, 6),)),
    ("noise", "1.5 s of noise or music inside", join(speech(2), noise(1.5), speech(2)),
     ((0, 2), (3.5, 5.5))),
    ("no_speech", "noise or music instead of speech", noise(SECONDS), ()),
    ("no_speech", "no speech", noise(0.8), ())])
def test_each_defect_is_caught_and_named(bark: ModuleType, kind: str, defect: str,
                                         samples: np.ndarray, heard: Any) -> None:
    (fault,) = judged(bark, samples, heard=heard).faults
    assert fault.kind == kind and defect in fault.message


@pytest.mark.parametrize("samples", [
    speech(), speech(3.0), speech(5.5), speech(level=-34), speech(level=-12),
    join(silence(1), speech(), silence(1)), join(speech(2), silence(1.2), speech(2)),
    join(speech(), noise(0.2)), join(speech(), noise(0.8))])
@pytest.mark.parametrize("heard", [None, ((0.0, 6.0),)])
def test_what_can_be_heard_well_passes(bark: ModuleType, samples: np.ndarray, heard: Any) -> None:
    assert judged(bark, samples, heard=heard).faults == ()


def test_a_long_text_may_take_long_and_a_short_one_short(bark: ModuleType) -> None:
    assert judged(bark, speech(0.3), 0.3).faults == ()
    assert judged(bark, speech(1.6), 0.2).faults == ()  # "Oh!" may be drawn out
    assert judged(bark, speech(12), 11).faults == ()


@pytest.mark.parametrize("share", [0.5, 2])
@pytest.mark.parametrize("seconds", [2.0, 4.0, 8.0, 12.0])
def test_half_a_text_and_a_text_said_twice_are_told_by_their_length(
        bark: ModuleType, seconds: float, share: float) -> None:
    (fault,) = judged(bark, speech(share * seconds), seconds).faults
    assert fault.kind == ("short" if share < 1 else "long")


def test_a_letter_that_the_detector_misses_passes_and_a_hum_in_its_place_does_not(
        bark: ModuleType) -> None:
    assert judged(bark, speech(0.4), 0.16, ()).faults == ()
    (fault,) = judged(bark, speech(1.5), 0.16, ()).faults
    assert fault.kind == "no_speech"


@pytest.mark.parametrize("text", ["Well. [laughs]", "[music] So it went.", "♪ Row, row ♪"])
def test_laughs_and_songs_that_are_asked_for_are_no_noise_and_not_cut_off(
        bark: ModuleType, text: str) -> None:
    samples = join(speech(), noise(2))
    verdict = judged(bark, samples, heard=WHOLE, text=text)
    assert verdict.faults == () and len(bark.polish(samples, RATE, verdict)) > 5.9 * RATE


def test_a_final_s_that_is_no_speech_to_the_detector_is_kept(bark: ModuleType) -> None:
    samples = join(speech(), noise(0.25))
    verdict = judged(bark, samples, heard=WHOLE)
    assert verdict.faults == () and verdict.speech.stop / RATE == pytest.approx(4.25, abs=0.03)


def test_of_two_bad_takes_the_one_counts_that_a_listener_would_keep(bark: ModuleType) -> None:
    worst_first = [
        judged(bark, noise(SECONDS), heard=()), judged(bark, speech(1.2), heard=WHOLE),
        judged(bark, speech(2), heard=WHOLE), judged(bark, speech(9), heard=((0, 9),)),
        judged(bark, join(speech(2), noise(1.5), speech(2)), heard=((0, 2), (3.5, 5.5))),
        judged(bark, join(speech(), noise(2)), heard=WHOLE), judged(bark, speech(), heard=WHOLE)]
    badness = [verdict.badness for verdict in worst_first]
    assert badness == sorted(badness, reverse=True)


# Trimming, edges, loudness

@pytest.mark.parametrize(("around", "heard"), [
    (lambda sound: join(silence(1.0), sound, silence(1.5)), None),
    (lambda sound: join(silence(1.0), sound, silence(1.5)), ((1.0, 5.0),)),
    (lambda sound: join(sound, silence(0.3), noise(0.9)), WHOLE),
    (lambda sound: join(noise(0.9), sound), ((0.9, 4.9),)),
    (lambda sound: join(silence(0.4), sound, noise(2.0)), ((0.4, 4.4),))])
def test_silence_and_noise_around_the_speech_are_cut_off(
        bark: ModuleType, around: Callable[[np.ndarray], np.ndarray], heard: Any) -> None:
    samples = around(speech())
    kept = bark.polish(samples, RATE, judged(bark, samples, heard=heard))
    assert SECONDS - 0.1 < len(kept) / RATE < SECONDS + 0.25


def test_edges_start_and_end_in_silence_without_a_step(bark: ModuleType) -> None:
    samples = speech() + np.float32(0.05)  # a step at either end
    kept = bark.polish(samples, RATE, judged(bark, samples))
    assert kept[0] == kept[-1] == 0
    assert np.abs(np.diff(kept[:50])).max() < 0.02 and np.abs(np.diff(kept[-50:])).max() < 0.02
    assert np.abs(samples[0]) > 0.02


@pytest.mark.parametrize(("level", "expected"), [
    (-20, -20), (-24, -20), (-17, -20), (-26, -20), (-34, -28), (-10, -16)])
def test_speech_is_brought_to_one_loudness_by_six_decibels_at_most(
        bark: ModuleType, level: float, expected: float) -> None:
    samples = np.clip(speech(level=level), -1, 1)
    kept = bark.polish(samples, RATE, judged(bark, samples))
    assert level_of(kept) == pytest.approx(expected, abs=0.6)


def test_loudness_depends_on_the_speech_and_not_on_the_silence_around_it(
        bark: ModuleType) -> None:
    samples = speech(level=-23)
    quiet = join(silence(2), samples, silence(3))
    one, other = (bark.polish(each, RATE, judged(bark, each))
                  for each in (samples, quiet))
    assert np.abs(one).max() == pytest.approx(np.abs(other).max(), rel=0.01)


def test_nothing_is_pushed_over_full_scale(bark: ModuleType) -> None:
    samples = speech(level=-26)
    samples[50_000:50_010] = 0.9  # a peak that 6 dB more would clip
    kept = bark.polish(samples, RATE, judged(bark, samples))
    assert 0.95 < np.abs(kept).max() <= 1.0


def test_takes_without_speech_are_polished_without_an_error(bark: ModuleType) -> None:
    for samples in (np.zeros(0, np.float32), silence(1), noise(2), with_nan(speech())):
        kept = bark.polish(samples, RATE, judged(bark, samples))
        assert len(kept) == len(samples) and np.isfinite(kept).all()


# Tries

def trial(bark: ModuleType, temperature: float = 0.7, expected: float | None = SECONDS) -> Any:
    sampling = bark.Sampling(temperature, 50, 1.0)
    segment = bark.Segment([1, 2], object(), 7, sampling, sampling, bark.Sampling(0.0))
    wanted = None if expected is None else bark.Wanted(expected)
    return bark.Trial(segment, wanted, RATE)


def add(bark: ModuleType, tries: Any, samples: np.ndarray, retries: int = 2) -> Any:
    """What becomes of a take of which the detector hears nothing after SECONDS."""
    heard = bark.Hearing(() if samples is HISS else WHOLE)
    return tries.add(samples, bark.judge(samples, RATE, tries.wanted, heard), retries)


HISS = noise(SECONDS)


def test_a_good_take_counts_at_once(bark: ModuleType) -> None:
    take = add(bark, trial(bark), speech())
    assert (take.takes, take.warnings) == (1, ()) and take.samples.dtype == np.int16


def test_a_bad_take_is_made_again_with_another_seed_and_cooler(bark: ModuleType) -> None:
    tries = trial(bark)
    first = tries.next_segment()
    assert first is tries.segment
    assert add(bark, tries, HISS) is None
    second = tries.next_segment()
    assert add(bark, tries, speech(1)) is None
    third = tries.next_segment()
    assert len({first.seed, second.seed, third.seed}) == 3
    for name in ("semantic_sampling", "coarse_sampling"):
        heat = [getattr(each, name).temperature for each in (first, second, third)]
        assert heat[0] > heat[1] > heat[2] > 0
    assert replace(second, seed=7).identity != first.identity
    again = trial(bark)
    add(bark, again, HISS)
    assert again.next_segment().seed == second.seed, "the same request must give the same audio"


def test_the_best_take_counts_and_what_is_wrong_with_it_is_told(bark: ModuleType) -> None:
    tries = trial(bark)
    assert add(bark, tries, silence(4)) is None
    assert add(bark, tries, join(speech(), noise(2))) is None
    take = add(bark, tries, HISS)
    assert take.takes == 3 and take.warnings == (
        "2.0 s of noise or music around the speech, cut off",)
    assert len(take.samples) / RATE == pytest.approx(SECONDS, abs=0.3)


def test_a_good_retake_leaves_no_warning(bark: ModuleType) -> None:
    tries = trial(bark)
    assert add(bark, tries, silence(4)) is None
    take = add(bark, tries, speech())
    assert (take.takes, take.warnings) == (2, ())


@pytest.mark.parametrize(("temperature", "retries"), [(0.7, 0), (0.0, 2)])
def test_what_would_come_out_the_same_or_may_not_be_made_again_is_not(
        bark: ModuleType, temperature: float, retries: int) -> None:
    take = add(bark, trial(bark, temperature), HISS, retries)
    assert take.takes == 1 and take.warnings == ("noise or music instead of speech",)


# The whole worker

@pytest.fixture(scope="module")
def judging(toy: Path) -> Iterator[Worker]:
    """A worker that judges the toy's babble."""
    with running_worker(BARK_MODEL=str(toy), BARK_QUALITY="on", BARK_RETRIES="1",
                        BARK_MAX_BATCH="2") as worker:
        worker.wait_for("ready")
        yield worker


def test_what_stays_bad_is_made_again_as_often_as_may_be_and_then_told_of(
        judging: Worker) -> None:
    def told() -> dict[str, int]:
        health, metrics = judging.health(), judging.call("/metrics").body.decode()
        return {**health["quality"], "no_speech": health["retakes"].get("no_speech", 0),
                "takes": int(float(re.search(r"^bark_takes_total (\S+)", metrics, re.M)[1]))}

    before = told()
    fields = {"text": f"{DIGITS}\n\n{DIGITS}", "min_eos_p": 0.001}
    reply = judging.speak(**fields).json
    assert [segment["takes"] for segment in reply["segments"]] == [2, 2]
    assert [segment["warnings"] for segment in reply["segments"]] == [["no speech"]] * 2
    again = judging.speak(**fields).json
    assert again["segments"] == reply["segments"]  # from memory
    after = told()
    assert {name: after[name] - before[name] for name in after} == {
        "segments": 2, "retakes": 2, "warnings": 2, "no_speech": 2, "takes": 4}


def test_temperature_and_eos_can_be_asked_for(judging: Worker) -> None:
    plain = judging.speak("Hi.", seed=1).json["audio"]
    for fields in ({"temperature": 0.3}, {"min_eos_p": 0.001}):
        assert judging.speak("Hi.", seed=1, **fields).json["audio"] != plain
    greedy = [judging.speak("Hi.", seed=seed, temperature=0).json for seed in (1, 2)]
    assert [reply["segments"][0]["takes"] for reply in greedy] == [1, 1]


@pytest.mark.parametrize(("field", "value", "allowed"), [
    ("temperature", 2.1, "0 to 2"), ("temperature", -1, "0 to 2"), ("min_eos_p", 0, "0.001 to 1"),
    ("min_eos_p", 1.5, "0.001 to 1"), ("temperature", "hot", "a number"),
    ("min_eos_p", True, "a number")])
def test_wrong_sampling_is_refused_with_what_is_allowed(
        judging: Worker, field: str, value: object, allowed: str) -> None:
    answer = judging.speak("Hi.", **{field: value})
    error = answer.json["error"]
    assert (answer.status, error["param"]) == (400, field) and allowed in error["message"]


def test_quality_off_gives_the_engines_samples_and_the_folders_sampling(
        bark: ModuleType, toy: Path, worker: Worker) -> None:
    facts = bark.ModelFacts(toy)
    (segment,) = bark.Narrator(facts, "v2/en_speaker_6").plan("Hi.", None, 5).segments
    assert segment.semantic_sampling == facts.semantic_sampling
    (made,) = Bench(bark, toy, slots=1).samples([segment])
    audio = base64.b64decode(worker.speak("Hi.", seed=5, format="pcm").json["audio"])
    assert np.array_equal(np.frombuffer(audio, "<i2"), bark.to_pcm16(made))
    assert "quality" not in worker.health()


def test_quality_on_is_cooler_and_ends_earlier_but_no_warmer_and_no_later(
        bark: ModuleType, toy: Path) -> None:
    def planned(folder: Path) -> Any:
        narrator = bark.Narrator(bark.ModelFacts(folder), "v2/en_speaker_6", quality=True)
        return narrator.plan("Hi.", None, 5).segments[0]

    hot, cool = bark.ModelFacts(toy), bark.ModelFacts(BUILTIN)
    assert hot.semantic_sampling.temperature > 0.6 > cool.semantic_sampling.temperature
    assert planned(toy).semantic_sampling == replace(hot.semantic_sampling, temperature=0.6)
    assert planned(toy).coarse_sampling == hot.coarse_sampling
    assert planned(BUILTIN).semantic_sampling == cool.semantic_sampling
    assert planned(toy).min_eos_p == planned(BUILTIN).min_eos_p == 0.1


# At length

CHAPTER = (Path(__file__).parent / "chapter.txt").read_text(encoding="utf-8")


def test_a_chapter_gets_the_cues_that_it_tells_of_and_no_others(
        bark: ModuleType, toy: Path) -> None:
    speech = bark.Narrator(bark.ModelFacts(toy), "v2/en_speaker_6").plan(CHAPTER, None, None)
    cues = [(cue, spoken) for spoken in speech.spoken for cue in bark.CUES if cue in spoken]
    assert [(cue, spoken[:12]) for cue, spoken in cues] == [
        ("[sighs]", '"I give up,"'), ("[gasps]", '"My grandfat')]
    assert sum("♪" in spoken for spoken in speech.spoken) == 4  # the song, in four segments


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_hundred_good_takes_are_all_let_pass(bark: ModuleType) -> None:
    bench = Bench(bark, BUILTIN, slots=8)
    narrator = bark.Narrator(bench.facts, "v2/en_speaker_6", quality=True)
    texts = [f"the {a} {b} is in the {c}" for a in ADJECTIVES for b in ANIMALS for c in PLACES]
    speeches = [narrator.plan(text, None, None) for text in texts[:: len(texts) // 200][:200]]
    segments = [segment for speech in speeches for segment in speech.segments]
    wanted = [each for speech in speeches for each in speech.wanted]
    takes = [samples for at in range(0, len(segments), 8)
             for samples in bench.samples(segments[at : at + 8])]
    judge = bark.Judge()
    judge.prepare()
    verdicts = [judge.submit(samples, RATE, each).result()
                for samples, each in zip(takes, wanted, strict=True)]
    kinds = Counter(fault.kind for verdict in verdicts for fault in verdict.faults)
    print(f"of {len(verdicts)} good takes refused, and so made once more: {dict(kinds)}")
    assert len(verdicts) >= 200
    assert [fault for verdict in verdicts for fault in verdict.faults] == []


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_chapter_is_read_to_its_end_without_a_word_left_out() -> None:
    with running_worker(BARK_MODEL=str(BUILTIN), BARK_QUALITY="on", TTS_MAX_LENGTH="20000",
                        BARK_TIMEOUT="2500") as worker:
        worker.wait_for("ready")
        answer = worker.call("/synthesize", {"text": CHAPTER, "stream": True, "format": "opus"},
                             timeout=2500)
    *lines, totals = map(json.loads, answer.body.splitlines())
    assert totals["status"] == "success" and totals["segments"] == len(lines)
    assert [line["index"] for line in lines] == list(range(len(lines)))
    end = moment = 0
    for line in lines:
        assert line["text"] == CHAPTER[line["from"] : line["to"]]
        assert not re.search(r"\w", CHAPTER[end : line["from"]])
        assert moment <= line["start"] < line["end"] <= totals["duration"]
        end, moment = line["to"], line["end"]
    assert not re.search(r"\w", CHAPTER[end:])
    warned = [line for line in lines if line["warnings"]]
    print(f"{len(lines)} segments, {totals['duration']:.0f} s in {totals['synthesis_time']:.0f} s,"
          f" {sum(line['takes'] for line in lines)} takes, {len(warned)} with warnings:",
          *((line["text"], line["warnings"]) for line in warned), sep="\n")
    assert len(warned) <= len(lines) / 20
