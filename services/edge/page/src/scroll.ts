// Following what is written: only for somebody who is at the end.

const END_PX = 48; // this close to the end counts as reading along

export interface Follower {
  /** The content has grown. */
  grown(): void;
  /** Go to the end, and stay there. */
  pin(): void;
}

export function follower(box: HTMLElement, latest: HTMLButtonElement): Follower {
  let pinned = true;
  const grown = () => {
    if (pinned) box.scrollTop = box.scrollHeight;
    latest.hidden = pinned;
  };
  const pin = () => {
    pinned = true;
    grown();
  };
  box.addEventListener("scroll", () => {
    pinned = box.scrollHeight - box.scrollTop - box.clientHeight < END_PX;
    latest.hidden = pinned;
  });
  new ResizeObserver(grown).observe(box);
  latest.addEventListener("click", () => {
    pin();
    box.focus({ preventScroll: true });
  });
  return { grown, pin };
}
