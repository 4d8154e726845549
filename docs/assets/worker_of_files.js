// A browser starts no worker from a file, so the search of pages that are opened as files would not start. There, the
// worker's script runs in a hidden frame, and messages are passed on. Pages from a server are not affected.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html>";
      this.frame = new Promise((resolve) => {
        frame.onload = () => {
          const inside = frame.contentWindow;
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          inside.importScripts = (...urls) => urls.reduce((before, one) => before.then(() => load(inside, one)),
            Promise.resolve());
          load(inside, url).then(() => resolve(inside));
        };
      });
      document.addEventListener("DOMContentLoaded", () => document.body.append(frame));
      if (document.body) document.body.append(frame);
    }
    postMessage(data) {
      this.frame.then((inside) => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }
  };
  const load = (inside, url) => new Promise((resolve, reject) => {
    const script = inside.document.createElement("script");
    script.src = url;
    script.onload = resolve;
    script.onerror = reject;
    inside.document.head.append(script);
  });
}
