// What each number and word of the page means, in a sentence or two. A view adds its own with `define`.

const words = {
  probability: "The share of certainty the network gives to a class: the softmax of its logits. All classes together make 100 %.",
  target: "The class whose map is shown: which parts of the picture speak for it in the network's eyes.",
  method: "How the map is made: the gradient alone, averaged along a path or over noise, or Grad-CAM's weighted feature map.",
  rule: "ParchGrad's rule: in every chosen layer the gradient of the class's own channels dominates, and the layer's gradient keeps its variance.",
  gini: "How concentrated the map is: 0 where every pixel counts the same, near 1 where a few pixels hold everything.",
  identity_layers: "Layers in which the rule changed nothing, as no channel, or every channel, was selected, or their gradient did not vary.",
  value: "The map's value at the pixel under the pointer: how much the target's logit changes with that pixel, in the model's own units.",
  opacity: "How much of the drawing lies over the photograph; 0 shows the photograph alone.",
  clip_lower: "The percentile of the map below which nothing is drawn.",
  clip_upper: "The percentile of the map above which all is drawn at full strength, so that a few extreme pixels do not hide the rest.",
  polarity: "Which sign counts: what raises the target's logit (positive), what lowers it (negative), or both by their size.",
  selection: "Class: the channels that a test over many images ties to the class. Instance: those unusually active on this picture.",
};

export const define = (more) => Object.assign(words, more);
export const meaning = (term) => words[term] ?? term;
