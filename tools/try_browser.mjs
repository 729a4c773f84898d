// Classifies photos with the page of docs/browser.md in headless Chromium, and prints the probabilities:
//
//   cd site && npm install playwright-core && python -m http.server &
//   node ../tools/try_browser.mjs http://localhost:8000 photo.jpg
//
// CHROMIUM is the path of the browser (default: /usr/bin/chromium). The exit status is 1 if a photo is not classified.

import { createRequire } from "node:module";

const { chromium } = createRequire(`${process.cwd()}/`)("playwright-core");
const [address, ...photos] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"],
});
const page = await browser.newPage();

// Waits until the message of the page is another one than before, and returns it.
async function message(before) {
  await page.waitForFunction(text => document.getElementById("message").textContent !== text, before);
  return page.textContent("#message");
}

try {
  await page.goto(address);
  console.log(await message("Loading the model …"));
  for (const photo of photos) {
    await page.evaluate(() => { document.getElementById("message").textContent = "waiting"; });
    await page.setInputFiles("#file", photo);
    const said = await message("waiting");
    const rows = await page.$$eval("#classes tr", rows => rows.map(
      row => `  ${(+row.dataset.probability).toFixed(6)} ${row.cells[0].textContent}`));
    console.log([`${photo}: ${said}`, ...rows].join("\n"));
    if (!rows.length) process.exitCode = 1;
  }
} finally {
  await browser.close();
}
