// The picture box: bundled pictures, files, the clipboard and the camera; what is chosen goes to the server as text.
(() => {
  "use strict";
  const send = (message) => window.sendPicture?.(message); // set where the box is loaded: app.py
  const say = (text) => {
    const told = document.querySelector("#box-told");
    if (told && told.textContent !== text) told.textContent = text;
  };
  const sendFile = (file, name) => {
    const most = Number(document.querySelector("#picture-box")?.dataset.most || 0);
    if (most && file.size > most) return say(`${name} has ${(file.size / 2 ** 20).toFixed(1)} MiB, more than the limit of ${most / 2 ** 20} MiB`);
    say(`sending ${name} ...`);
    const reader = new FileReader();
    reader.onload = () => send({ name, data: reader.result.slice(reader.result.indexOf(",") + 1) });
    reader.readAsDataURL(file);
  };
  new MutationObserver((changes) => {
    if (changes.some((change) => change.target.closest?.("#live, #preview"))) say("");
  }).observe(document.documentElement, { childList: true, subtree: true });
  let stream = null;
  const closeCamera = () => {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    document.querySelector("#camera")?.setAttribute("hidden", "");
  };
  const openCamera = async () => {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: true });
    } catch (error) {
      return say(`no camera: ${error.message}`);
    }
    const camera = document.querySelector("#camera");
    camera.removeAttribute("hidden");
    const video = camera.querySelector("video");
    video.srcObject = stream;
    await video.play();
    camera.querySelector("button").focus();
  };
  const takePhoto = () => {
    const video = document.querySelector("#camera video");
    const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => { closeCamera(); sendFile(blob, "photo.png"); }, "image/png");
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.bundled !== undefined) {
      document.querySelectorAll("button[data-bundled]").forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
      send({ bundled: button.dataset.bundled });
    } else if (["ask", "compare"].includes(button.id) && innerWidth < 700) {
      document.querySelector("#live").scrollIntoView(); // below the form on a phone
    } else if (button.id === "open-file") document.querySelector("#file").click();
    else if (button.id === "open-camera") openCamera();
    else if (button.id === "take-photo") takePhoto();
    else if (button.id === "close-camera") closeCamera();
  });
  document.addEventListener("change", (event) => {
    if (event.target.id !== "file" || !event.target.files.length) return;
    sendFile(event.target.files[0], event.target.files[0].name);
    event.target.value = "";
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files || [])].find((one) => one.type.startsWith("image/"));
    if (file) { event.preventDefault(); sendFile(file, file.name || "pasted.png"); }
  });
  document.addEventListener("dragover", (event) => { if (event.target.closest?.("#picture-box")) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    if (!event.target.closest?.("#picture-box") || !event.dataTransfer.files.length) return;
    event.preventDefault();
    sendFile(event.dataTransfer.files[0], event.dataTransfer.files[0].name);
  });
})();
