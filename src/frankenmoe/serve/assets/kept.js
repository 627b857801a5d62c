// What a reload must not lose, in the storage of this tab: the conversation, the controls, the API key.
// The number in the name changes when what is kept is another thing.

const NAME = "frankenmoe-1", KEY = "frankenmoe-key";

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
};

// `kept` gives the state without the routing of as many of the oldest turns as it is told: the storage is small
export const keep = (kept, turns) => {
  for (const share of [0, 0.5, 1]) {
    try {
      sessionStorage.setItem(NAME, JSON.stringify(kept(Math.ceil(share * turns))));
      return;
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
    }
  }
};

export const found = () => JSON.parse(sessionStorage.getItem(NAME) ?? "null");
