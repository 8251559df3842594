// What the numbers of the Layers view mean.

import { define } from "../../words.js";

define({
  layers_activation: "What the convolution gives for this picture, negative values cut off: where this channel's pattern was found. All pictures of a layer share one scale, on which weak values are lifted.",
  layers_plain: "The gradient of the target's logit at this convolution, with the rule in no layer: what an ordinary gradient map is made of. Orange raises the logit, purple lowers it.",
  layers_before: "The gradient that arrives at this convolution on the way back. The rule in all later layers has already worked on it. Orange raises the logit, purple lowers it.",
  layers_after: "What this layer's rule lets on towards the picture: the arriving gradient times the channel's factor. A channel with factor 0 is dropped.",
  layers_share: "The part of this layer's gradient energy, the sum of all squared values, that lies in the selected channels. 100 % after the rule: everything else was dropped.",
  layers_feature: "The channel's GAP feature: the mean of its activation over the picture. The selection table is made of it.",
  layers_deviations: "How far the feature lies above its mean over the table's images, in standard deviations. Above 2 is unusual.",
  layers_rank: "The channel's place in the table among the channels of this layer, for the target; the first is tied most surely to the class.",
  layers_p: "The chance of so clear a difference between the class's images and all others if there were none (one-sided Welch test).",
  layers_factor: "What the rule multiplies this channel's gradient by: a times b where it is selected, b where it is not.",
  layers_energy: "The channel's part of the layer's gradient energy: the sum of its squared values over that of all channels.",
  layers_high: "S_H: the arriving gradients of all selected channels added up, position by position.",
  layers_low: "S_L: the arriving gradients of all other channels added up, position by position.",
  layers_after_sum: "The sum of all channels after the rule. Its spread is what the rule keeps; its shape is now that of S_H.",
  layers_m: "M: the variance of S_H over the positions, how much the selected side varies from place to place.",
  layers_n: "N: the variance of S_L over the positions, how much the other side varies.",
  layers_k: "K: the covariance of S_H and S_L. Below zero, the two sides cancel each other.",
  layers_a: "a: how much more the selected side counts than the other before both are brought back to size; 1 where gamma is infinite, as the other side is dropped altogether.",
  layers_b: "b: brings the gradient back to its size before the rule, so that a layer neither swells nor shrinks what passes it.",
  layers_sd: "The standard deviation over the positions of all channels' sum, as it arrives and after the rule. With conserve exact both are the same.",
  layers_order: "Which channels count as the strongest: by activation, by the energy of the arriving gradient, or by their rank in the table.",
});
