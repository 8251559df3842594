// What the words of the Explain view mean; those that other views use too stand in words.js.

import { define } from "../../words.js";

define({
  quantile: "The share of each layer's channels that the rule keeps for the class: those that a test over many images ties to it most surely. 0.1 keeps a tenth. At 1 all are kept, and the map is the plain method's.",
  gamma: "How far the kept channels outweigh the others: the spread of their part of the gradient, in units of the others' part. Infinite: the others count for nothing. At 0 only the others count. The neutral point, where the rule changes nothing, is the ratio the two parts have by themselves; it differs from layer to layer and from picture to picture.",
  reading: "The map's value at the crosshair, in the model's own units (how much the class's score changes with that pixel); how much of the map is weaker, so that at 99 % only one pixel in a hundred is stronger; and the pixel's place in the map. A click keeps the crosshair, Escape lets it go; with Shift the arrow keys take steps of ten.",
  crosshair: "The same point of the picture in every map shown. Move the pointer, or the arrow keys once the picture has the focus (with Shift in steps of ten); a click keeps it, Escape lets it go.",
  conserve: "How the rule keeps the gradient's size from layer to layer. Independent: as if the two parts did not go together. Exact: with their correlation. None: the others are left out, nothing is made up for.",
  colormap: "The colours from weak to strong. Those of the first group get steadily lighter and keep apart for colour-blind eyes; rainbows do not, and show edges where the map has none.",
  overlay: "What lies under the colours: the photograph dimmed, the same in grey, the photograph black where the map is weak, or nothing.",
  outline: "Borders around the regions that matter most, instead of pixels. The service draws them, so this one needs an answer.",
  clip: "Percentiles of the map: what is weaker than the lower is not drawn, what is stronger than the upper is drawn in full. A few extreme pixels then do not hide the rest.",
  time: "From asking to the whole answer, as this page measured it: the network, the map, and the way there and back.",
  shares: "Each of the two maps is divided by its own sum, so that both hold the same whole: where A's share of it is larger the picture is orange, where B's is larger, blue. The sizes of two classes' gradients cannot be compared, their shares can.",
  curl: "A line for a terminal: with it the service gives the same answer, and the same picture, again. Every option is written out, so that later defaults change nothing.",
  frame: "The network saw only what lies inside the frame: pictures are scaled and cut before they reach it.",
  layers: "The layers in which the rule acts.",
  steps: "How many points between black and the picture the gradient is averaged over.",
  samples: "Over how many noisy copies of the picture the gradient is averaged.",
  alpha: "The channels are chosen by the p-value of their test, at most this, and not by quantile.",
});
