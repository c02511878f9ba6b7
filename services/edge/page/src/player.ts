// Moving along a tape: playing, by its facts, by pointer or keys on its picture.

import { h, setText } from "./dom.ts";
import { day, offset, time } from "./duration.ts";
import { next, placeAt } from "./moment.ts";
import { number } from "./quantity.ts";
import type { Timeline } from "./timeline.ts";

const FRAMES_AT_MAX = 150; // in which the whole log passes at the greatest speed
const LEAP_MS_MAX = 250; // of the clock between two frames: a tab that was hidden goes on where it was
const SPEEDS = [1, 2, 5, 20, Infinity];

export interface Player {
  /** Lies over the picture of the tape. */
  readonly range: HTMLInputElement;
  readonly node: HTMLElement;
  /** Of the moment that is shown. */
  readonly place: number;
  /** ms on the strip; between two moments while it plays. */
  readonly at: number;
  /** Puts in another tape; goes to its end from the end of the one before, and else stays. */
  load(timeline: Timeline): void;
  go(place: number): void;
  pause(): void;
}

/** `moved` is called for each place that it comes to. */
export function player(moved: () => void): Player {
  let timeline: Timeline | null = null;
  let place = 0;
  let at = 0;
  let frame = 0; // of the animation while it plays
  const end = () => (timeline?.moments.length ?? 0) - 1;

  const range = h("input", { type: "range", min: 0, step: "any", "aria-label": "Moment" });
  const playing = h("button.primary.play", { type: "button", onclick: () => (frame ? pause() : play()) }, "Play");
  const options = SPEEDS.map((times) => h("option", { value: times }, Number.isFinite(times) ? `${times}×` : "max"));
  const speed = h("select", { "aria-label": "Speed" }, ...options);
  const clock = h("p.clock");
  const when = h("p.when");
  const fact = (direction: 1 | -1) => () => {
    if (timeline) go(next(timeline.moments, place, direction, (moment) => moment.fact));
  };
  const node = h(
    "div.transport",
    { role: "group", "aria-label": "Playing" },
    h("button", { type: "button", "aria-label": "Previous fact", onclick: fact(-1) }, "‹ Fact"),
    playing,
    h("button", { type: "button", "aria-label": "Next fact", onclick: fact(1) }, "Fact ›"),
    speed,
    clock,
    when,
  );

  function go(index: number, position = timeline?.moments[index]?.at ?? 0): void {
    const moment = timeline?.moments[index];
    if (!timeline || !moment) return;
    [place, at] = [index, position];
    const { moments, length_ms } = timeline;
    const where = `event ${number(place + 1)} of ${number(moments.length)}`;
    range.value = String(at);
    range.setAttribute("aria-valuetext", `${offset(at)} of ${offset(length_ms)}, ${where}, ${moment.type}`);
    setText(clock, `${offset(at)} / ${offset(length_ms)}`);
    setText(when, `${where} · ${day(moment.ts)} ${time(moment.ts)}`);
    moved();
  }

  function play(): void {
    if (place >= end()) [place, at] = [0, 0];
    setText(playing, "Pause");
    let before = performance.now();
    const step = (now: number): void => {
      if (!timeline) return;
      const times = Number(speed.value);
      const passed = Math.min(now - before, LEAP_MS_MAX);
      before = now;
      if (Number.isFinite(times)) {
        const position = Math.min(timeline.length_ms, at + passed * times);
        go(placeAt(timeline.moments, position), position);
      } else go(Math.min(end(), place + Math.ceil(timeline.moments.length / FRAMES_AT_MAX)));
      if (place >= end()) pause();
      else frame = requestAnimationFrame(step);
    };
    frame = requestAnimationFrame(step);
  }

  function pause(): void {
    cancelAnimationFrame(frame);
    frame = 0;
    setText(playing, "Play");
  }

  range.addEventListener("input", () => {
    const position = Number(range.value);
    if (timeline) go(Math.max(0, placeAt(timeline.moments, position)), position);
  });
  range.addEventListener("keydown", (key) => {
    const page = Math.max(1, Math.round(end() / 20));
    const wanted: Record<string, number> = {
      ArrowRight: place + 1,
      ArrowUp: place + 1,
      ArrowLeft: place - 1,
      ArrowDown: place - 1,
      PageUp: place + page,
      PageDown: place - page,
      Home: 0,
      End: end(),
    };
    const index = wanted[key.key];
    if (index !== undefined) go(Math.max(0, Math.min(end(), index)));
    else if (key.key === " ") playing.click();
    else return;
    key.preventDefault();
  });

  return {
    range,
    node,
    get place() {
      return place;
    },
    get at() {
      return at;
    },
    load(wanted) {
      const wasAtEnd = place >= end();
      timeline = wanted;
      range.max = String(wanted.length_ms);
      if (wasAtEnd) go(end(), wanted.length_ms);
      else go(place, at);
    },
    go,
    pause,
  };
}
