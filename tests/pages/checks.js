// What a reader would complain of, one line each. `width` is that of the window; an empty list is a good page.
(width) => {
  const found = [];
  const root = document.documentElement;
  const called = (e) => {
    const text = (e.textContent || '').trim().replace(/\s+/g, ' ').slice(0, 50);
    const name = e.getAttribute('class') ? `${e.localName}.${e.getAttribute('class').trim().replace(/\s+/g, '.')}` : e.localName;
    return text ? `${name} “${text}”` : name;
  };
  const complain = (what, e) => found.push(e ? `${what}: ${called(e)} in ${e.parentElement ? called(e.parentElement).split(' “')[0] : '-'}` : what);
  const all = [...document.body.querySelectorAll('*')];
  const shown = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility === 'visible' && !e.closest('.unseen');
  const scrolls = (e) => e.closest('.scroll') !== null;

  // the frame
  if (document.compatMode !== 'CSS1Compat') complain('quirks mode');
  if (!root.lang || !document.title.trim()) complain('no language or no title');
  if (document.querySelectorAll('h1').length !== 1) complain('not one h1');
  let level = 1;
  for (const e of document.querySelectorAll('h1,h2,h3,h4,h5,h6')) {
    if (+e.localName[1] > level + 1) complain('a level of headings is left out', e);
    level = +e.localName[1];
  }
  const ids = all.map((e) => e.id).filter(Boolean);
  ids.filter((id, at) => ids.indexOf(id) !== at).forEach((id) => complain(`id ${id} twice`));

  // room
  if (root.scrollWidth > width || innerWidth > width) complain(`the page is ${Math.max(root.scrollWidth, innerWidth)} wide`);
  for (const e of all) {
    if (!(e instanceof HTMLElement) || !shown(e) || e.localName === 'pre' && getComputedStyle(e).overflowX === 'auto') continue;
    const style = getComputedStyle(e);
    if (style.display !== 'inline' && e.clientWidth && e.scrollWidth > e.clientWidth + 1 && !e.classList.contains('scroll'))
      complain(`${style.overflowX === 'visible' ? 'spills over' : 'cut off'} by ${e.scrollWidth - e.clientWidth}`, e);
    if (style.textOverflow === 'ellipsis' || style.webkitLineClamp !== 'none') complain('hides text', e);
  }

  // text: size, contrast, place
  const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, alpha, below) => below.map((v, k) => top[k] * alpha + v * (1 - alpha));
  const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((s, v, k) => s + v * [0.2126, 0.7152, 0.0722][k], 0);
  const base = rgba(getComputedStyle(document.body).backgroundColor).slice(0, 3);
  const behind = (e) => {
    let ground = base;
    const chain = [];
    for (let at = e; at && at !== document.body; at = at.parentElement) if (at instanceof HTMLElement) chain.unshift(at);
    for (const at of chain) {
      const c = rgba(getComputedStyle(at).backgroundColor);
      ground = over(c, c[3], ground);
    }
    if (e instanceof SVGElement)  // on the boxes that were drawn before it and lie under it
      for (const box of e.parentElement.querySelectorAll(':scope > rect')) {
        const style = getComputedStyle(box), [r, t] = [box.getBoundingClientRect(), e.getBoundingClientRect()];
        if (style.fill === 'none' || r.left > t.left || r.right < t.right || r.top > t.top + t.height / 2 || r.bottom < t.top + t.height / 2) continue;
        const c = rgba(style.fill);
        ground = over(c, c[3] * +style.fillOpacity, ground);
      }
    return ground;
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, e = node.parentElement;
    if (!node.data.trim() || !shown(e) || e.closest('title') || (e instanceof SVGElement && e.localName !== 'text')) continue;
    texts.push([node, e]);
  }
  const seen = new Map();
  for (const [node, e] of texts) {
    const style = getComputedStyle(e), drawn = e instanceof SVGElement;
    const size = parseFloat(style.fontSize) * (drawn ? Math.abs(e.getScreenCTM().a) || 1 : 1);
    if (!e.getAttribute('transform') && size < (drawn ? 9.4 : 12)) complain(`text of ${size.toFixed(1)} px`, e);
    const fore = rgba(drawn ? style.fill : style.color), ground = behind(e);
    const key = `${fore}|${ground.map(Math.round)}|${called(e).split(' “')[0]}`;
    if (!seen.has(key)) {
      const [a, b] = [light(over(fore, fore[3], ground)), light(ground)];
      const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      seen.set(key, contrast);
      const large = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
      if (contrast < (large ? 3 : 4.5)) complain(`contrast ${contrast.toFixed(2)}`, e);
    }
    if (/(^|[^\w.-])(nan|None|undefined|inf)([^\w.]|$)/.test(node.data) && !e.closest('pre,bdi')) complain('a value of the program', e);
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects())
      if (!scrolls(e) && e.closest('pre') === null && (r.left < -1 || r.right > width + 1)) complain('text leaves the page', e);
  }
  for (const svg of document.querySelectorAll('svg')) {
    const edge = svg.getBoundingClientRect();
    const lines = [...svg.querySelectorAll('text')].map((e) => [e, e.getBoundingClientRect()]);
    for (const [e, r] of lines)
      if (r.left < edge.left - 2 || r.right > edge.right + 2 || r.top < edge.top - 3 || r.bottom > edge.bottom + 3) complain('text leaves its picture', e);
    for (const box of svg.querySelectorAll('rect.box')) {
      const b = box.getBoundingClientRect();
      for (const e of box.parentElement.querySelectorAll('text')) if (e.getBoundingClientRect().right > b.right + 0.5) complain('text leaves its box', e);
    }
    const flat = lines.filter(([e]) => !e.getAttribute('transform'));
    flat.forEach(([e, r], at) => flat.slice(at + 1).forEach(([f, s]) => {
      const across = Math.min(r.right, s.right) - Math.max(r.left, s.left), down = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
      if (across > 1 && down > Math.min(r.height, s.height) * 0.35) complain(`text on “${f.textContent}”`, e);
    }));
  }

  // what those read who do not see
  for (const e of document.querySelectorAll('img')) if (!(e.getAttribute('alt') || '').trim()) complain('a picture without text', e);
  for (const e of document.querySelectorAll('img')) if (!e.complete || !e.naturalWidth) complain(`a picture that does not load, ${e.alt}`, e);
  for (const e of document.querySelectorAll('svg'))
    if (e.getAttribute('aria-hidden') !== 'true' && (e.getAttribute('role') !== 'img' || !(e.getAttribute('aria-label') || '').trim())) complain('a drawing without text', e);
  for (const e of document.querySelectorAll('table')) {
    if (!e.querySelector('th')) complain('a table without headings', e);
    const columns = [...e.rows].map((row) => [...row.cells].reduce((sum, cell) => sum + cell.colSpan, 0));
    if (new Set(columns).size > 1) complain(`rows of ${[...new Set(columns)]} cells`, e);
  }
  for (const e of document.querySelectorAll('th')) if (!['col', 'row'].includes(e.getAttribute('scope')) || !e.textContent.trim()) complain('a heading without scope or text', e);

  // links
  for (const e of document.querySelectorAll('a')) {
    const to = e.getAttribute('href') || '';
    if (!e.textContent.trim()) complain('a link without text', e);
    if (to.startsWith('#') && !document.getElementById(to.slice(1))) complain(`a link to ${to}, which is not there`, e);
  }
  for (const e of document.querySelectorAll('nav a')) {
    const r = e.getBoundingClientRect();
    if (r.height < 24 || r.width < 24) complain(`a target of ${r.width.toFixed(0)} by ${r.height.toFixed(0)}`, e);
  }
  return [...new Set(found)];
}
