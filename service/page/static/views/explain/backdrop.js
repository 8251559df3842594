// The picture that maps are laid over: the browser's own decoding, or the service's where the two do not agree.

// {bitmap, box, boxOf(record), note}: `box` is where the maps lie on `bitmap`, in its pixels, or null before an answer;
// `note` says why the picture is not the file's own. `record` may be null: then only what the browser shows.
export async function backdropOf(asker, image, record, signal) {
  const transform = record?.explanation?.transform;
  if (!image.bitmap && !record) return null;
  if (image.bitmap && (!transform || agree(image, transform))) {
    const boxOf = (one) => one?.explanation?.transform?.crop_box ?? null;
    return { bitmap: image.bitmap, box: boxOf(record), boxOf, note: "" };
  }
  // Opacity 0: what the model saw, without the map. The plain gradient is there for every class.
  const fields = { model: record.fields.model, version: record.fields.version, rule: false, opacity: 0 };
  const bitmap = await asker.picture(image, fields, {}, signal);
  const box = [0, 0, bitmap.width, bitmap.height];
  const why = image.bitmap ? "The browser shows this file in another size than the service." : "The browser cannot show this kind of file.";
  return { bitmap, box, boxOf: () => box, note: `${why} Here is what the model saw of it.` };
}

const agree = (image, { original_size: [width, height] }) => image.width === width && image.height === height;
