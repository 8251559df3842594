// The image at hand: a file, and what the browser shows of it upright. It stays in the page until a view asks about it.

let made = 0;

// {id, file, name, bitmap, width, height, decoded}; `bitmap` is null where the browser cannot show this kind of file.
export async function fromFile(file, name = file.name || "pasted picture", id = ++made) {
  let bitmap = null;
  try {
    // Colour profiles are ignored, as the service ignores them: what is shown is what the model sees.
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    // The service may know the format all the same, or will say what is wrong with the file.
  }
  return { id, file, name, bitmap, width: bitmap?.width ?? 0, height: bitmap?.height ?? 0, decoded: true };
}

// The same before anything is decoded: of hundreds of photographs only the one that is opened is.
export function undecoded(file, name = file.name || "pasted picture") {
  return { id: ++made, file, name, bitmap: null, width: 0, height: 0, decoded: false };
}

export function thumbnail(image, side = 96) {
  const canvas = document.createElement("canvas");
  const scale = image.bitmap ? side / Math.max(image.width, image.height) : 1;
  canvas.width = image.bitmap ? Math.max(1, Math.round(image.width * scale)) : side;
  canvas.height = image.bitmap ? Math.max(1, Math.round(image.height * scale)) : side;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", image.name);
  if (image.bitmap) canvas.getContext("2d").drawImage(image.bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}
