"use strict";
const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const data = JSON.parse(document.getElementById("data").textContent);
const word = (place) => (place === undefined ? "" : data.words[place]);

/** An element with classes and a text. Texts of the report are never read as HTML. */
const make = (tag, names = "", text = "") => {
  const element = document.createElement(tag);
  if (names) element.className = names;
  if (text !== "") element.textContent = text;
  return element;
};
/** Untrusted text: isolated, so that its direction and its length do not affect the text beside it. */
const foreign = (text) => make("bdi", "", text);

const two = (number) => String(number).padStart(2, "0");
const clock = (seconds) => {
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
};
const duration = (seconds) => {
  if (seconds < 100) return seconds >= 1 ? `${seconds.toFixed(1)} s` : `${seconds.toFixed(2)} s`;
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes} min ${two(whole % 60)} s` : `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
};
const bytes = (size) => (size < 1e9 ? `${(size / 1e6).toFixed(1)} MB` : `${(size / 1e9).toFixed(2)} GB`);
const money = (value) => (Math.abs(value) >= 1 ? value.toFixed(2) : value.toFixed(4));
const ratio = (value) => `${value.toFixed(2)}×`;
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
