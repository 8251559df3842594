// The state of the page: one plain object, replaced on every change; who listens is told which keys changed.

export function createStore(initial) {
  let state = initial;
  const listeners = new Set();
  return {
    get: () => state,
    set(patch) {
      const changed = new Set(Object.keys(patch).filter((key) => !Object.is(patch[key], state[key])));
      if (!changed.size) return;
      state = { ...state, ...patch };
      for (const listener of [...listeners]) listener(state, changed);
    },
    // Returns what ends the subscription.
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

// The options and classes of a beginning, where those of an address are refused.
export const defaults = () => ({ options: {}, target: "predicted", rival: null });

// How a map is drawn where nothing else is said; the service's own defaults, and opacity.
export const DRAWING = {
  colormap: "inferno",
  overlay: "original",
  polarity: "both",
  clip_lower: 0,
  clip_upper: 99.5,
  outline: false,
  opacity: 1,
};
