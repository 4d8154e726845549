// A browser starts no worker from a file, so the search would not work on pages that are opened as files. There, the
// worker's script runs in a hidden frame, and messages are passed on. Pages from a server are not affected.
if (location.protocol === "file:") {
  const load = (inside, url) => new Promise((resolve, reject) => {
    const script = inside.document.createElement("script");
    script.src = url;
    script.onload = resolve;
    script.onerror = reject;
    inside.document.head.append(script);
  });

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame); // an empty frame is loaded at once, and this page may use what is in it
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside.importScripts = (...urls) => urls.reduce(
        (before, one) => before.then(() => load(this.inside, one)), Promise.resolve());
      this.ready = load(this.inside, url);
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })));
    }
  };
}
