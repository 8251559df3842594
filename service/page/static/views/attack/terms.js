// What the words of the Attack view mean, in a sentence or two.

import { define } from "../../words.js";

define({
  attack: "What is done to the picture. FGSM and PGD use the network's own gradient to find the change that misleads it most; blur, noise, JPEG and watermark know nothing of the network.",
  attack_levels: "The most that any colour value of any pixel may change, of 255 levels. People see nothing of 2 or 4.",
  attack_blur: "How far each pixel spreads: at 1 the standard deviation is 1/32 of the picture's shorter side.",
  attack_noise: "How much random noise is added: at 1 its standard deviation is 64 of 255 levels.",
  attack_jpeg: "How strongly the picture is compressed: JPEG's quality is 95 at almost 0 and 5 at 1.",
  attack_watermark: "How opaque the text over the picture is; at 1 it hides what lies under it.",
  attack_steps: "PGD follows the gradient this many times, a little each time, and stays within the strength. One step is close to FGSM.",
  attack_goal: "The class that the attack leads to. Any other: it only leads away from the class that is predicted now.",
  attack_start: "PGD starts at a random picture within the strength; another start can end elsewhere.",
  attack_change: "The difference of the two pictures, magnified around grey: grey has not changed, brighter and darker has.",
  attack_agreement: "Whether the two maps put the pixels in the same order of importance (Spearman's rank correlation): 1 the same order, 0 none in common.",
  attack_overlap: "Of the tenth of the pixels that matter most before, and the tenth after, how much is common: 100 % all, 5 % is what chance gives.",
  attack_shift: "How far the map's centre of mass has moved, in shares of the picture's diagonal.",
  attack_channel: "A channel's change: how much its mean activity rose or fell, in standard deviations over the images the table was built from.",
  attack_size: "How much the layer's channels changed altogether: the root mean square of their changes, in standard deviations.",
  attack_old: "The mean change of the channels that the table selects for the class predicted before, and not for the other.",
  attack_new: "The mean change of the channels that the table selects for the class predicted after (or the goal), and not for the other.",
});
